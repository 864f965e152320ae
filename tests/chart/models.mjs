// Holds custom resources to the models of their CRDs. Reads a JSON array of resources; writes a JSON array of
// sentences. The folder to find the packages in is the first argument.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(`${process.argv[2]}/`));
const { HTTPRoute } = require("@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1");
const monitoring = require.resolve("@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/index");
const { ServiceMonitor, PrometheusRule } = await import(pathToFileURL(monitoring));

const models = { HTTPRoute, ServiceMonitor, PrometheusRule };
const findings = [];
for (const resource of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    new models[resource.kind](resource).validate();
  } catch (error) {
    findings.push(`${resource.kind}/${resource.metadata?.name}: ${error.message}`);
  }
}
console.log(JSON.stringify(findings));
