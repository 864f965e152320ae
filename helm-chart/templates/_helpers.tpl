{{/* Names, labels and other helpers shared by several templates. Contradictory values are rejected in _validate.tpl. */}}

{{/*
Sets every missing value to its default. Every template begins by including it. In an upgrade with --reuse-values, Helm reads the
values.yaml of the installed chart instead of this one, so values that were added since then are missing. Templates cannot read
values.yaml, so files/values.yaml is a copy of it.
*/}}
{{- define "key-service.defaults" -}}
{{- include "key-service.setDefaults" (list .Values (.Files.Get "files/values.yaml" | fromYaml)) }}
{{- end }}

{{/*
Sets missing or null values of a map to their defaults. Argument: a list of the map and its defaults. Structures that Kubernetes
defines are not changed, because null removes a field from them. The CPU target of the autoscaler is not changed either, because null
means "no target".
*/}}
{{- define "key-service.setDefaults" -}}
{{- $values := index . 0 }}
{{- range $key, $default := index . 1 }}
{{- if not (kindIs "invalid" (index $values $key)) }}
{{- if and (kindIs "map" $default) (not (has $key (list "labels" "podSecurityContext" "resources" "securityContext"))) }}
{{- include "key-service.setDefaults" (list (index $values $key) $default) }}
{{- end }}
{{- else if ne $key "targetCPUUtilizationPercentage" }}
{{- $_ := set $values $key $default }}
{{- end }}
{{- end }}
{{- end }}

{{- define "key-service.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/*
The name of a Service is a DNS label that begins with a letter (RFC 1035). Since "-metrics" is appended, it has at most 55 characters.
If the release's name begins with a digit, it comes after the chart's name.
*/}}
{{- define "key-service.fullname" -}}
{{- $name := include "key-service.name" . }}
{{- $fullname := .Values.fullnameOverride }}
{{- if $fullname }}
{{- else if regexMatch "^[0-9]" .Release.Name }}
{{- $fullname = printf "%s-%s" $name .Release.Name }}
{{- else if contains $name .Release.Name }}
{{- $fullname = .Release.Name }}
{{- else }}
{{- $fullname = printf "%s-%s" .Release.Name $name }}
{{- end }}
{{- $fullname | trunc 55 | trimAll "-" }}
{{- end }}

{{- define "key-service.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "key-service.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "key-service.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{/* Selector of Services, disruption budgets and network policies. It must not change between releases. */}}
{{- define "key-service.selectorLabels" -}}
app.kubernetes.io/name: {{ include "key-service.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: server
{{- end }}

{{/*
All labels of a resource. Argument: a dictionary.
  root: the root context of the chart
  component: the value of app.kubernetes.io/component; server by default
  labels: labels of this resource only
  isPod: true for a pod template; omits the chart's version, so that a new chart version alone does not replace the pods
*/}}
{{- define "key-service.labels" -}}
{{- $root := .root }}
{{- $labels := dict
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
  "app.kubernetes.io/name" (include "key-service.name" $root)
  "app.kubernetes.io/instance" $root.Release.Name
  "app.kubernetes.io/component" (default "server" .component)
  "app.kubernetes.io/version" ($root.Chart.AppVersion | replace "+" "_" | trunc 63 | trimSuffix "-")
  "app.kubernetes.io/managed-by" $root.Release.Service
}}
{{- if .isPod }}
{{- $_ := unset $labels "helm.sh/chart" }}
{{- end }}
{{- toYaml (merge $labels (default dict .labels) $root.Values.commonLabels) }}
{{- end }}

{{/* The metadata of a resource. Argument: a dictionary of root, component and labels as above, name or its suffix, annotations. */}}
{{- define "key-service.metadata" -}}
name: {{ default (printf "%s%s" (include "key-service.fullname" .root) (default "" .suffix)) .name | quote }}
namespace: {{ .root.Release.Namespace | quote }}
labels:
  {{- include "key-service.labels" . | nindent 2 }}
{{- with merge (dict) (default dict .annotations) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/*
Kubernetes 1.34 renamed PreferClose to PreferSameZone and added PreferSameNode. Versions before 1.30 do not have the field.
*/}}
{{- define "key-service.trafficDistribution" -}}
{{- $version := .Capabilities.KubeVersion.Version }}
{{- with .Values.service.trafficDistribution }}
{{- if semverCompare ">=1.34-0" $version }}
{{- eq . "PreferClose" | ternary "PreferSameZone" . }}
{{- else if semverCompare ">=1.30-0" $version }}
{{- "PreferClose" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "key-service.servicePort" -}}
{{- default .Values.server.port .Values.service.port | int64 }}
{{- end }}

{{/* Longer than the daemon's own drain, so that the kubelet kills only a daemon that does not stop in time. */}}
{{- define "key-service.gracePeriod" -}}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds }}
{{- add .Values.server.drainDelay .Values.server.drainTimeout 5 }}
{{- else }}
{{- .Values.terminationGracePeriodSeconds | int64 }}
{{- end }}
{{- end }}

{{/* The daemon's configuration file: key-service.toml(5). */}}
{{- define "key-service.config" -}}
host = {{ .Values.server.host | quote }}
srv-port = {{ .Values.server.port | int64 }}
max-size = {{ .Values.server.maxSize | int64 }}
metrics-port = {{ .Values.metrics.port | int64 }}
log-level = {{ .Values.server.logLevel | quote }}
workers = {{ .Values.server.workers | int64 }}
max-connections = {{ .Values.server.maxConnections | int64 }}
max-connections-per-client = {{ .Values.server.maxConnectionsPerClient | int64 }}
head-timeout = {{ .Values.server.headTimeout | int64 }}
idle-timeout = {{ .Values.server.idleTimeout | int64 }}
write-timeout = {{ .Values.server.writeTimeout | int64 }}
drain-delay = {{ .Values.server.drainDelay | int64 }}
drain-timeout = {{ .Values.server.drainTimeout | int64 }}
{{- if include "key-service.tlsSecret" . }}
tls-cert = "/run/key-service/tls/tls.crt"
tls-key = "/run/key-service/tls/tls.key"
tls-min-version = {{ .Values.tls.minVersion | quote }}
{{- end }}
{{- if include "key-service.hasClientCA" . }}
tls-client-ca = "/run/key-service/client-ca/ca.crt"
{{- end }}
{{- if .Values.tokens.existingSecret }}
tokens-file = "/run/key-service/tokens/tokens"
{{- end }}
audit = {{ .Values.audit }}
rate-requests = {{ .Values.rates.requests | int64 }}
rate-bytes = {{ .Values.rates.bytes | int64 }}
rate-burst = {{ .Values.rates.burst | int64 }}
trusted-proxies = {{ .Values.trustedProxies | toJson }}
forwarded-header = {{ .Values.forwardedHeader | quote }}
proxy-protocol = {{ .Values.proxyProtocol }}
{{- end }}

{{/* The Secret with the certificate and its key; empty without TLS. */}}
{{- define "key-service.tlsSecret" -}}
{{- if .Values.tls.certificate.enabled }}
{{- include "key-service.fullname" . }}-tls
{{- else }}
{{- .Values.tls.existingSecret }}
{{- end }}
{{- end }}

{{/* DNS names of the Service inside the cluster. */}}
{{- define "key-service.dnsNames" -}}
{{- $name := include "key-service.fullname" . -}}
- {{ $name | quote }}
- {{ printf "%s.%s" $name .Release.Namespace | quote }}
- {{ printf "%s.%s.svc" $name .Release.Namespace | quote }}
- {{ printf "%s.%s.svc.cluster.local" $name .Release.Namespace | quote }}
{{- end }}

{{- define "key-service.scheme" -}}
{{- if include "key-service.tlsSecret" . }}https{{ else }}http{{ end }}
{{- end }}

{{- define "key-service.hasClientCA" -}}
{{- or .Values.tls.clientCA.existingSecret .Values.tls.clientCA.existingConfigMap }}
{{- end }}

{{/*
The port that `helm test` uses. The test has no client certificate and sends no PROXY header. The metrics port requires neither and
serves the same /health.
*/}}
{{- define "key-service.healthPort" -}}
{{- if or (include "key-service.hasClientCA" .) .Values.proxyProtocol }}metrics{{ else }}http{{ end }}
{{- end }}

{{/* A NetworkPolicy peer for the pod of `helm test`, if it uses this port. Argument: a list of the root context and the port. */}}
{{- define "key-service.testPeer" -}}
{{- $root := index . 0 }}
{{- if eq (index . 1) (include "key-service.healthPort" $root) -}}
# `helm test`
- podSelector:
    matchLabels:
      app.kubernetes.io/name: {{ include "key-service.name" $root | quote }}
      app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
      app.kubernetes.io/component: test
{{- end }}
{{- end }}

{{/* The URL that `helm test` checks. */}}
{{- define "key-service.testURL" -}}
{{- $name := include "key-service.fullname" . }}
{{- if eq (include "key-service.healthPort" .) "metrics" }}
{{- printf "http://%s-metrics:%d" $name (int64 .Values.metrics.port) }}
{{- else }}
{{- printf "%s://%s:%s" (include "key-service.scheme" .) $name (include "key-service.servicePort" .) }}
{{- end }}
{{- end }}

{{/*
Volumes for the Secrets that the values name. The mode is 0440 (288 in decimal): the daemon rejects a private key that others can
read, and reads it through fsGroup. Each Secret has its own volume, so that a Secret that cannot be updated does not block the others.
*/}}
{{- define "key-service.secretVolumes" -}}
{{- with include "key-service.tlsSecret" . }}
- name: key-service-tls
  secret:
    secretName: {{ . | quote }}
    defaultMode: 288
    items:
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
{{- end }}
{{- with .Values.tls.clientCA }}
{{- if or .existingSecret .existingConfigMap }}
- name: key-service-client-ca
  {{- if .existingSecret }}
  secret:
    secretName: {{ .existingSecret | quote }}
  {{- else }}
  configMap:
    name: {{ .existingConfigMap | quote }}
  {{- end }}
    defaultMode: 288
    items:
      - key: {{ .key | quote }}
        path: ca.crt
{{- end }}
{{- end }}
{{- with .Values.tokens }}
{{- if .existingSecret }}
- name: key-service-tokens
  secret:
    secretName: {{ .existingSecret | quote }}
    defaultMode: 288
    items:
      - key: {{ .key | quote }}
        path: tokens
{{- end }}
{{- end }}
{{- end }}

{{/*
A probe. Argument: a list of the path and the probe's values. Probes use the metrics port, which has its own connection limits and its
own thread. A flood of the key port from the node's address, which the kubelet also uses, therefore neither restarts a pod nor removes
it from the Service.
*/}}
{{- define "key-service.probe" -}}
httpGet:
  path: {{ index . 0 | quote }}
  port: metrics
{{ toYaml (omit (index . 1) "enabled") }}
{{- end }}

{{- define "key-service.renderManifest" -}}
{{- $manifest := index . 1 }}
{{- tpl (kindIs "string" $manifest | ternary $manifest (toYaml $manifest)) (index . 0) }}
{{- end }}
