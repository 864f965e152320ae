// Checks custom resources against the models of their CRDs. Reads lines with a JSON array of resources; writes for each line a JSON
// array of errors, null for a valid resource. The argument is the directory in which the packages are installed.
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const load = (path) => import(pathToFileURL(`${process.argv[2]}/node_modules/@kubernetes-models/${path}/v1/index.js`));
const { BackendTLSPolicy, HTTPRoute } = await load("gateway-api/gateway.networking.k8s.io");
const { Certificate } = await load("cert-manager/cert-manager.io");
const { ServiceMonitor, PrometheusRule } = await load("prometheus-operator/monitoring.coreos.com");

const models = { BackendTLSPolicy, Certificate, HTTPRoute, ServiceMonitor, PrometheusRule };
for await (const line of createInterface({ input: process.stdin })) {
  const errors = JSON.parse(line).map((resource) => {
    try {
      new models[resource.kind](resource).validate();
      return null;
    } catch (error) {
      return error.message;
    }
  });
  console.log(JSON.stringify(errors));
}
