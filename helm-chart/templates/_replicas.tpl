{{/*
spec.replicas of the Deployment, chosen so that switching autoscaling never removes a pod; an empty result omits the field. If Helm
drops the field from a manifest, Kubernetes resets it to its default, 1. With autoscaling, the field is therefore omitted only if that
changes nothing:
  - There is no live Deployment: a new release, or a manifest that is rendered without a cluster.
  - The annotation key-service/replicas of the live Deployment shows that the last manifest omitted the field.
  - Helm uses server-side apply and is not the only owner of the field. Helm 3 does not use it, and leaves an Update entry that makes
    Helm 4 continue as Helm 3 did.
Otherwise the manifest keeps the live number. Just after autoscaling is switched off, the live Deployment still has the annotation.
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

{{/* The number of pods that keep running, if it is greater than replicaCount; for NOTES.txt. */}}
{{- define "key-service.keptReplicas" -}}
{{- $replicas := include "key-service.replicas" . }}
{{- if and (not .Values.autoscaling.enabled) (ne $replicas (.Values.replicaCount | int64 | toString)) }}
{{- $replicas }}
{{- end }}
{{- end }}
