{{/*
spec.replicas of the Deployment, so that no switch of autoscaling removes a pod; empty leaves the field out. Kubernetes sets a field
that Helm drops from a manifest to its default, 1. With autoscaling the field is left out only where that changes nothing:
  - no live Deployment is found: a new release, or a manifest that is rendered without a cluster;
  - the annotation key-service/replicas of the live Deployment shows that the last manifest left the field out;
  - Helm applies server-side and is not the only owner of the field. Helm 3 does not, and leaves an Update entry that makes Helm 4 go on
    as Helm 3 did.
Elsewhere the manifest keeps the live number. When autoscaling is switched off, the live Deployment still has the annotation.
*/}}
{{- define "key-service.replicas" -}}
{{- $live := lookup "apps/v1" "Deployment" .Release.Namespace (include "key-service.fullname" .) }}
{{- $running := dig "spec" "replicas" 0 $live }}
{{- $annotation := dig "metadata" "annotations" "key-service/replicas" "" $live }}
{{- $operations := list (semverCompare ">=4-0" .Capabilities.HelmVersion.Version | ternary "" "Update") }}
{{- $owners := list }}
{{- range dig "metadata" "managedFields" list $live }}
{{- if eq .manager "helm" }}
{{- $operations = append $operations .operation }}
{{- end }}
{{- if hasKey (dig "f:spec" dict .fieldsV1) "f:replicas" }}
{{- $owners = append $owners .manager }}
{{- end }}
{{- end }}
{{- $isApplied := and (has "Apply" $operations) (not (has "Update" $operations)) }}
{{- if not .Values.autoscaling.enabled }}
{{- max .Values.replicaCount (empty $annotation | ternary 0 $running) }}
{{- else if not (or (empty $live) (eq $annotation "autoscaler") (and $isApplied (ne (join " " $owners) "helm"))) }}
{{- max .Values.autoscaling.minReplicas $running }}
{{- end }}
{{- end }}

{{/* How many pods go on where that is more than replicaCount; for NOTES.txt. */}}
{{- define "key-service.keptReplicas" -}}
{{- $replicas := include "key-service.replicas" . }}
{{- if and (not .Values.autoscaling.enabled) (ne $replicas (.Values.replicaCount | int64 | toString)) }}
{{- $replicas }}
{{- end }}
{{- end }}
