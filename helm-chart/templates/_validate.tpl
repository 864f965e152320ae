{{/* What values.schema.json can't say: values that contradict each other. Every sentence begins with the field's name. */}}

{{- define "key-service.validate" -}}
{{- $server := .Values.server }}
{{- if eq (int64 $server.port) (int64 .Values.metrics.port) }}
{{- fail (printf "metrics.port: expected another port than server.port, found %d for both" (int64 $server.port)) }}
{{- end }}

{{- $drain := add $server.drainDelay $server.drainTimeout }}
{{- if le (include "key-service.gracePeriod" . | int64) $drain }}
{{- fail (printf "terminationGracePeriodSeconds: expected more than server.drainDelay + server.drainTimeout = %d, found %s" $drain (include "key-service.gracePeriod" .)) }}
{{- end }}

{{- $none := list "0" "0%" }}
{{- if and (has (toString .Values.rollingUpdate.maxSurge) $none) (has (toString .Values.rollingUpdate.maxUnavailable) $none) }}
{{- fail "rollingUpdate.maxSurge: expected more than 0 where rollingUpdate.maxUnavailable is 0, else no update can begin" }}
{{- end }}

{{- $budget := .Values.podDisruptionBudget }}
{{- if not (or (kindIs "invalid" $budget.minAvailable) (kindIs "invalid" $budget.maxUnavailable)) }}
{{- fail "podDisruptionBudget.maxUnavailable: expected null where podDisruptionBudget.minAvailable is set" }}
{{- end }}

{{- with .Values.autoscaling }}
{{- if .enabled }}
{{- if gt (int64 .minReplicas) (int64 .maxReplicas) }}
{{- fail (printf "autoscaling.maxReplicas: expected at least autoscaling.minReplicas = %d, found %d" (int64 .minReplicas) (int64 .maxReplicas)) }}
{{- end }}
{{- if not (or .targetCPUUtilizationPercentage .targetMemoryUtilizationPercentage .metrics) }}
{{- fail "autoscaling.targetCPUUtilizationPercentage: expected a target, or autoscaling.targetMemoryUtilizationPercentage or autoscaling.metrics" }}
{{- end }}
{{- $requests := default dict $.Values.resources.requests }}
{{- if and .targetCPUUtilizationPercentage (not $requests.cpu) }}
{{- fail "resources.requests.cpu: expected a quantity where autoscaling.targetCPUUtilizationPercentage is set" }}
{{- end }}
{{- if and .targetMemoryUtilizationPercentage (not $requests.memory) }}
{{- fail "resources.requests.memory: expected a quantity where autoscaling.targetMemoryUtilizationPercentage is set" }}
{{- end }}
{{- end }}
{{- end }}

{{- with .Values.service }}
{{- if eq .type "ClusterIP" }}
{{- range list "nodePort" "externalTrafficPolicy" }}
{{- if get $.Values.service . }}
{{- fail (printf "service.%s: expected nothing where service.type is ClusterIP" .) }}
{{- end }}
{{- end }}
{{- else if eq .clusterIP "None" }}
{{- fail (printf "service.clusterIP: expected an address or nothing where service.type is %s, found None" .type) }}
{{- end }}
{{- if ne .type "LoadBalancer" }}
{{- range list "loadBalancerClass" "loadBalancerSourceRanges" }}
{{- if get $.Values.service . }}
{{- fail (printf "service.%s: expected nothing where service.type is %s" . $.Values.service.type) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
{{- fail "ingress.hosts: expected at least one host where ingress.enabled is true" }}
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
{{- fail "httpRoute.parentRefs: expected at least one Gateway where httpRoute.enabled is true" }}
{{- end }}
{{- with .Values.metrics.prometheusRule }}
{{- if and .enabled .alerts (not .recording) }}
{{- fail "metrics.prometheusRule.recording: expected true where metrics.prometheusRule.alerts is true, as alerts are made of recorded series" }}
{{- end }}
{{- if and .enabled (not (or .alerts .recording .extraGroups)) }}
{{- fail "metrics.prometheusRule.enabled: expected rules to load: recording, alerts or extraGroups" }}
{{- end }}
{{- end }}

{{- with .Values.tls }}
{{- $isOn := include "key-service.tlsSecret" $ }}
{{- if and .existingSecret .certificate.enabled }}
{{- fail "tls.existingSecret: expected nothing where tls.certificate.enabled is true" }}
{{- end }}
{{- if and .certificate.enabled (not .certificate.issuerRef.name) }}
{{- fail "tls.certificate.issuerRef.name: expected an issuer where tls.certificate.enabled is true" }}
{{- end }}
{{- if and .clientCA.existingSecret .clientCA.existingConfigMap }}
{{- fail "tls.clientCA.existingConfigMap: expected nothing where tls.clientCA.existingSecret is set" }}
{{- end }}
{{- if and (include "key-service.hasClientCA" $) (not $isOn) }}
{{- fail "tls.clientCA: expected nothing without TLS: set tls.existingSecret or tls.certificate.enabled" }}
{{- end }}
{{- $backend := $.Values.httpRoute.backendTLS }}
{{- if and $isOn $.Values.httpRoute.enabled (not (or $backend.caCertificateRefs $backend.wellKnownCACertificates)) }}
{{- fail "httpRoute.backendTLS.caCertificateRefs: expected the CA of the pods' certificate, or httpRoute.backendTLS.wellKnownCACertificates, where httpRoute.enabled is true and the pods serve TLS" }}
{{- end }}
{{- if and $backend.caCertificateRefs $backend.wellKnownCACertificates }}
{{- fail "httpRoute.backendTLS.wellKnownCACertificates: expected nothing where httpRoute.backendTLS.caCertificateRefs is set" }}
{{- end }}
{{- end }}
{{- if and .Values.proxyProtocol (not .Values.trustedProxies) }}
{{- fail "trustedProxies: expected the load balancer's addresses where proxyProtocol is true" }}
{{- end }}

{{/* Ports, probes, Services and the grace period are made from these values; an override would part them. */}}
{{- $owned := dict "host" "server.host" "srv-port" "server.port" "metrics-port" "metrics.port" "metrics-host" "server.host" "drain-delay" "server.drainDelay" "drain-timeout" "server.drainTimeout" "tls-cert" "tls.existingSecret" "tls-key" "tls.existingSecret" "tls-client-ca" "tls.clientCA" "proxy-protocol" "proxyProtocol" }}
{{- range $name, $value := $owned }}
{{- $variable := printf "KEYSERVICE_%s" ($name | upper | replace "-" "_") }}
{{- range $.Values.extraEnv }}
{{- if eq .name $variable }}
{{- fail (printf "extraEnv: expected %s instead of %s" $value $variable) }}
{{- end }}
{{- end }}
{{- $flag := printf "--%s" $name }}
{{- range $.Values.extraArgs }}
{{- if or (eq . $flag) (hasPrefix (printf "%s=" $flag) .) }}
{{- fail (printf "extraArgs: expected %s instead of %s" $value $flag) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
