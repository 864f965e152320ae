// Holds custom resources to the models of their CRDs. Reads a JSON array of resources; writes a JSON array of
// sentences. The argument is the folder that the packages are installed in.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const load = (path) => import(pathToFileURL(`${process.argv[2]}/node_modules/@kubernetes-models/${path}/v1/index.js`));
const { BackendTLSPolicy, HTTPRoute } = await load("gateway-api/gateway.networking.k8s.io");
const { Certificate } = await load("cert-manager/cert-manager.io");
const { ServiceMonitor, PrometheusRule } = await load("prometheus-operator/monitoring.coreos.com");

const models = { BackendTLSPolicy, Certificate, HTTPRoute, ServiceMonitor, PrometheusRule };
const findings = [];
for (const resource of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    new models[resource.kind](resource).validate();
  } catch (error) {
    findings.push(`${resource.kind}/${resource.metadata?.name}: ${error.message}`);
  }
}
console.log(JSON.stringify(findings));
