{{/* Names, labels and what several templates share; what contradicts itself is in _validate.tpl. */}}

{{- define "key-service.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* A Service's name is a DNS label, and "-metrics" is appended to it: 55 characters at most. */}}
{{- define "key-service.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 55 | trimSuffix "-" }}
{{- else }}
{{- $name := include "key-service.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 55 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 55 | trimSuffix "-" }}
{{- end }}
{{- end }}
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

{{/* Whom Services, budgets and policies select. It can't change between releases. */}}
{{- define "key-service.selectorLabels" -}}
app.kubernetes.io/name: {{ include "key-service.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{/*
All labels of a resource. A dictionary:
  root: the chart's scope
  component: what the resource is for
  labels: the resource's own
  isPod: whether it is the template of pods, which a new chart alone must not replace
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

{{/* The metadata of a resource. A dictionary: root, component and labels as above, suffix of the name, annotations. */}}
{{- define "key-service.metadata" -}}
name: {{ default (printf "%s%s" (include "key-service.fullname" .root) (default "" .suffix)) .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "key-service.labels" . | nindent 2 }}
{{- with merge (dict) (default dict .annotations) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "key-service.servicePort" -}}
{{- default .Values.server.port .Values.service.port | int64 }}
{{- end }}

{{/* Time to be killed only if the daemon's own deadlines are not kept. */}}
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
head-timeout = {{ .Values.server.headTimeout | int64 }}
idle-timeout = {{ .Values.server.idleTimeout | int64 }}
write-timeout = {{ .Values.server.writeTimeout | int64 }}
drain-delay = {{ .Values.server.drainDelay | int64 }}
drain-timeout = {{ .Values.server.drainTimeout | int64 }}
{{- end }}

{{/* A probe. A list: the path, and the probe's values. */}}
{{- define "key-service.probe" -}}
httpGet:
  path: {{ index . 0 }}
  port: http
{{ toYaml (omit (index . 1) "enabled") }}
{{- end }}

{{- define "key-service.renderManifest" -}}
{{- $manifest := index . 1 }}
{{- tpl (kindIs "string" $manifest | ternary $manifest (toYaml $manifest)) (index . 0) }}
{{- end }}
