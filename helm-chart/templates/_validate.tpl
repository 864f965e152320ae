{{/* Rejects contradictory values, which values.schema.json cannot express. Every message begins with the name of the field. */}}

{{- define "key-service.validate" -}}
{{- $server := .Values.server }}
{{- if eq (int64 $server.port) (int64 .Values.metrics.port) }}
{{- fail (printf "metrics.port: expected a port other than server.port, found %d for both" (int64 $server.port)) }}
{{- end }}

{{- $drain := add $server.drainDelay $server.drainTimeout }}
{{- if le (include "key-service.gracePeriod" . | int64) $drain }}
{{- fail (printf "terminationGracePeriodSeconds: expected more than server.drainDelay + server.drainTimeout = %d, found %s" $drain (include "key-service.gracePeriod" .)) }}
{{- end }}

{{- $none := list "0" "0%" }}
{{- if and (has (toString .Values.rollingUpdate.maxSurge) $none) (has (toString .Values.rollingUpdate.maxUnavailable) $none) }}
{{- fail "rollingUpdate.maxSurge: expected more than 0 if rollingUpdate.maxUnavailable is 0, because otherwise no update can start" }}
{{- end }}

{{- $budget := .Values.podDisruptionBudget }}
{{- if not (or (kindIs "invalid" $budget.minAvailable) (kindIs "invalid" $budget.maxUnavailable)) }}
{{- fail "podDisruptionBudget.maxUnavailable: expected null if podDisruptionBudget.minAvailable is set" }}
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
{{- fail "resources.requests.cpu: expected a quantity if autoscaling.targetCPUUtilizationPercentage is set" }}
{{- end }}
{{- if and .targetMemoryUtilizationPercentage (not $requests.memory) }}
{{- fail "resources.requests.memory: expected a quantity if autoscaling.targetMemoryUtilizationPercentage is set" }}
{{- end }}
{{- end }}
{{- end }}

{{- with .Values.service }}
{{- if eq .type "ClusterIP" }}
{{- range list "nodePort" "externalTrafficPolicy" }}
{{- if get $.Values.service . }}
{{- fail (printf "service.%s: expected no value if service.type is ClusterIP" .) }}
{{- end }}
{{- end }}
{{- else if eq .clusterIP "None" }}
{{- fail (printf "service.clusterIP: expected an address or no value if service.type is %s, found None" .type) }}
{{- end }}
{{- if ne .type "LoadBalancer" }}
{{- range list "loadBalancerClass" "loadBalancerSourceRanges" }}
{{- if get $.Values.service . }}
{{- fail (printf "service.%s: expected no value if service.type is %s" . $.Values.service.type) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- if and .Values.ingress.className (ne .Values.ingress.className (get .Values.ingress.annotations "kubernetes.io/ingress.class" | default .Values.ingress.className)) }}
{{- fail (printf "ingress.className: expected the class of the annotation kubernetes.io/ingress.class, or no annotation, found %s" .Values.ingress.className) }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
{{- fail "ingress.hosts: expected at least one host if ingress.enabled is true" }}
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
{{- fail "httpRoute.parentRefs: expected at least one Gateway if httpRoute.enabled is true" }}
{{- end }}
{{- with .Values.metrics.prometheusRule }}
{{- if and .enabled .alerts (not .recording) }}
{{- fail "metrics.prometheusRule.recording: expected true if metrics.prometheusRule.alerts is true, because the alerts use recorded series" }}
{{- end }}
{{- if and .enabled (not (or .alerts .recording .extraGroups)) }}
{{- fail "metrics.prometheusRule.enabled: expected rules to load: recording, alerts or extraGroups" }}
{{- end }}
{{- end }}

{{- with .Values.tls }}
{{- $isOn := include "key-service.tlsSecret" $ }}
{{- if and .existingSecret .certificate.enabled }}
{{- fail "tls.existingSecret: expected no value if tls.certificate.enabled is true" }}
{{- end }}
{{- if and .certificate.enabled (not .certificate.issuerRef.name) }}
{{- fail "tls.certificate.issuerRef.name: expected an issuer if tls.certificate.enabled is true" }}
{{- end }}
{{- if and .clientCA.existingSecret .clientCA.existingConfigMap }}
{{- fail "tls.clientCA.existingConfigMap: expected no value if tls.clientCA.existingSecret is set" }}
{{- end }}
{{- if and (include "key-service.hasClientCA" $) (not $isOn) }}
{{- fail "tls.clientCA: expected no value without TLS; set tls.existingSecret or tls.certificate.enabled" }}
{{- end }}
{{- $backend := $.Values.httpRoute.backendTLS }}
{{- if and $isOn $.Values.httpRoute.enabled (not (or $backend.caCertificateRefs $backend.wellKnownCACertificates)) }}
{{- fail "httpRoute.backendTLS.caCertificateRefs: expected the CA of the pods' certificate, or httpRoute.backendTLS.wellKnownCACertificates, if httpRoute.enabled is true and the pods serve TLS" }}
{{- end }}
{{- if and $backend.caCertificateRefs $backend.wellKnownCACertificates }}
{{- fail "httpRoute.backendTLS.wellKnownCACertificates: expected no value if httpRoute.backendTLS.caCertificateRefs is set" }}
{{- end }}
{{- end }}
{{- if and .Values.proxyProtocol (not .Values.trustedProxies) }}
{{- fail "trustedProxies: expected the load balancer's addresses if proxyProtocol is true" }}
{{- end }}

{{/* Ports, probes, Services and the grace period are derived from these values; overriding the setting would contradict them. */}}
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
{{- range list "names" "pods" "resources" "disruption" "addresses" "monitoring" }}
{{- include (printf "key-service.validate.%s" .) $ }}
{{- end }}
{{- end }}

{{- define "key-service.validate.names" -}}
{{- $fullname := include "key-service.fullname" . }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $fullname) }}
{{- fail (printf "fullnameOverride: expected a name for all resources, because the release's name gives %s, and the name of a Service cannot contain a dot" $fullname) }}
{{- end }}
{{- range $path := list "commonAnnotations" "podAnnotations" "service.annotations" "serviceAccount.annotations" "ingress.annotations" "httpRoute.annotations"
  "metrics.serviceAnnotations" "metrics.serviceMonitor.annotations" "metrics.prometheusRule.annotations" "metrics.dashboard.annotations" }}
{{- $annotations := $.Values }}
{{- range splitList "." $path }}
{{- $annotations = index $annotations . }}
{{- end }}
{{- /* The API server allows 256 KiB in all; Helm and controllers need a part of that. */}}
{{- $size := toJson $annotations | len }}
{{- if gt $size 200000 }}
{{- fail (printf "%s: expected at most 200000 bytes, found %d" $path $size) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Parts of the pods: names, ports, paths and variables must be unique and must not collide with the daemon's own. */}}
{{- define "key-service.validate.pods" -}}
{{- /* The chart's own volumes, which values cannot replace. */}}
{{- $volumes := list "config" "key-service-tls" "key-service-client-ca" "key-service-tokens" }}
{{- range .Values.extraVolumes }}
{{- if has .name $volumes }}
{{- fail (printf "extraVolumes: expected unique names, found %s twice" .name) }}
{{- end }}
{{- $volumes = append $volumes .name }}
{{- end }}

{{- range .Values.extraVolumeMounts }}
{{- $place := clean .mountPath }}
{{- /* The container runtime cannot create a mount point in a read-only volume. A mount above it would hide other files. */}}
{{- range $own := list "/etc/key-service" "/run/key-service" }}
{{- if or (hasPrefix (printf "%s/" $own) (printf "%s/" $place)) (has $place (list "/" (dir $own))) }}
{{- fail (printf "extraVolumeMounts: expected a mountPath separate from %s, where the chart mounts its own files read-only, for example /run/key-service-secrets, found %s" $own $place) }}
{{- end }}
{{- end }}
{{- end }}

{{- $daemon := dict "name" "key-service" "env" .Values.extraEnv "volumeMounts" .Values.extraVolumeMounts "ports" (list
  (dict "name" "http" "containerPort" .Values.server.port) (dict "name" "metrics" "containerPort" .Values.metrics.port)) }}
{{- $names := list }}
{{- $ports := list }}
{{- range $field, $containers := dict "" (list $daemon) "extraContainers" .Values.extraContainers "extraInitContainers" .Values.extraInitContainers }}
{{- range $containers }}
{{- $container := . }}
{{- if has .name $names }}
{{- fail (printf "%s: expected unique names, found %s twice" $field .name) }}
{{- end }}
{{- $names = append $names .name }}
{{- /* Containers that run at the same time share the pod's ports. */}}
{{- if or (ne $field "extraInitContainers") (eq (toString .restartPolicy) "Always") }}
{{- range .ports }}
{{- $number := printf "%d/%s" (int64 .containerPort) (default "TCP" .protocol) }}
{{- range list .name $number | compact }}
{{- if has . $ports }}
{{- fail (printf "%s: expected unique port names and numbers in a pod, found %s twice" $field .) }}
{{- end }}
{{- $ports = append $ports . }}
{{- end }}
{{- end }}
{{- end }}
{{- $places := list }}
{{- range .volumeMounts }}
{{- if not (has .name $volumes) }}
{{- fail (printf "%s: expected a volume of extraVolumes, found %s" (default "extraVolumeMounts" $field) .name) }}
{{- end }}
{{- $place := clean .mountPath }}
{{- if has $place $places }}
{{- fail (printf "%s: expected unique mountPaths, found %s twice" (default "extraVolumeMounts" $field) $place) }}
{{- end }}
{{- $places = append $places $place }}
{{- end }}
{{- $variables := list }}
{{- range .env }}
{{- if has .name $variables }}
{{- fail (printf "%s: expected unique variables, found %s twice" (default "extraEnv" $field) .name) }}
{{- end }}
{{- $variables = append $variables .name }}
{{- end }}
{{- end }}
{{- end }}

{{- $spreads := list }}
{{- range .Values.topologySpreadConstraints }}
{{- $spread := printf "%s+%s" .topologyKey .whenUnsatisfiable }}
{{- if has $spread $spreads }}
{{- fail (printf "topologySpreadConstraints: expected unique pairs of topologyKey and whenUnsatisfiable, found %s twice" $spread) }}
{{- end }}
{{- $spreads = append $spreads $spread }}
{{- if and .minDomains (ne .whenUnsatisfiable "DoNotSchedule") }}
{{- fail (printf "topologySpreadConstraints: expected minDomains only with DoNotSchedule, found it with %s" .whenUnsatisfiable) }}
{{- end }}
{{- end }}
{{- range .Values.tolerations }}
{{- if and .value (eq (toString .operator) "Exists") }}
{{- fail (printf "tolerations: expected no value if the operator is Exists, found %s" .value) }}
{{- end }}
{{- if and (not .key) (ne (toString .operator) "Exists") }}
{{- fail "tolerations: expected the operator Exists if there is no key" }}
{{- end }}
{{- if and (hasKey . "tolerationSeconds") (ne (toString .effect) "NoExecute") }}
{{- fail "tolerations: expected tolerationSeconds only with the effect NoExecute" }}
{{- end }}
{{- end }}

{{- $context := mergeOverwrite (dict) (pick .Values.podSecurityContext "runAsNonRoot" "runAsUser") .Values.securityContext }}
{{- if and $context.runAsNonRoot (eq (toString $context.runAsUser) "0") }}
{{- fail "securityContext.runAsUser: expected a user other than 0 if runAsNonRoot is true" }}
{{- end }}
{{- if eq (toString $context.allowPrivilegeEscalation) "false" }}
{{- if or $context.privileged (has "CAP_SYS_ADMIN" (dig "capabilities" "add" list $context)) }}
{{- fail "securityContext.allowPrivilegeEscalation: expected true for a container that is privileged or has CAP_SYS_ADMIN" }}
{{- end }}
{{- end }}
{{- end }}

{{/* Requests of every container must not exceed the limits, and must be set if the autoscaler measures utilization against them. */}}
{{- define "key-service.validate.resources" -}}
{{- range $field, $containers := dict "resources" (list .Values) "extraContainers" .Values.extraContainers "extraInitContainers" .Values.extraInitContainers }}
{{- range $containers }}
{{- $path := eq $field "resources" | ternary "resources.requests" (printf "%s: %s: resources.requests" $field .name) }}
{{- $resources := default dict .resources }}
{{- $limits := default dict $resources.limits }}
{{- range $resource, $request := default dict $resources.requests }}
{{- if and (regexMatch "/|^hugepages-" $resource) (ne (toString $request) (index $limits $resource | toString)) }}
{{- fail (printf "%s.%s: expected the same as resources.limits.%s, found %v" $path $resource $resource $request) }}
{{- end }}
{{- $limit := index $limits $resource }}
{{- if not (or (kindIs "invalid" $limit) (kindIs "invalid" $request)) }}
{{- if gt (include "key-service.quantity" $request | float64) (include "key-service.quantity" $limit | float64) }}
{{- fail (printf "%s.%s: expected at most the limit %v, found %v" $path $resource $limit $request) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (eq $field "extraContainers") $.Values.autoscaling.enabled }}
{{- range $resource, $target := dict "cpu" $.Values.autoscaling.targetCPUUtilizationPercentage "memory" $.Values.autoscaling.targetMemoryUtilizationPercentage }}
{{- if and $target (not (or (dig "requests" $resource "" $resources) (index $limits $resource))) }}
{{- fail (printf "%s.%s: expected a quantity, because the autoscaler measures utilization against the requests of all containers" $path $resource) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* A Kubernetes quantity as a number: 500m is 0.5, 1Ki is 1024, 1e3 is 1000. */}}
{{- define "key-service.quantity" -}}
{{- $factors := dict "" 1.0 "n" 1e-9 "u" 1e-6 "m" 1e-3 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18
  "Ki" 0x1p10 "Mi" 0x1p20 "Gi" 0x1p30 "Ti" 0x1p40 "Pi" 0x1p50 "Ei" 0x1p60 }}
{{- $suffix := regexFind "[a-zA-Z]+$" (toString .) }}
{{- mulf (toString . | trimSuffix $suffix | float64) (index $factors $suffix) }}
{{- end }}

{{/* A disruption budget that allows no disruption would block every node drain. Kubernetes rounds percentages up. */}}
{{- define "key-service.validate.disruption" -}}
{{- with .Values.podDisruptionBudget }}
{{- $autoscaled := $.Values.autoscaling.enabled }}
{{- $pods := $autoscaled | ternary $.Values.autoscaling.minReplicas $.Values.replicaCount | int64 }}
{{- if and .enabled (gt $pods 0) }}
{{- $stay := toString .minAvailable }}
{{- if hasSuffix "%" $stay }}
{{- $stay = div (add (mul (trimSuffix "%" $stay | int64) $pods) 99) 100 }}
{{- end }}
{{- if and (not (kindIs "invalid" .minAvailable)) (ge (int64 $stay) $pods) }}
{{- fail (printf "podDisruptionBudget.minAvailable: expected fewer than all %d pods of %s, so that nodes can be drained, found %v" $pods ($autoscaled | ternary "autoscaling.minReplicas" "replicaCount") .minAvailable) }}
{{- end }}
{{- if regexMatch "^0+%?$" (toString .maxUnavailable) }}
{{- fail (printf "podDisruptionBudget.maxUnavailable: expected more than 0, so that nodes can be drained, found %v" .maxUnavailable) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "key-service.validate.addresses" -}}
{{- $blocks := list }}
{{- range .Values.service.loadBalancerSourceRanges }}
{{- $blocks = append $blocks (dict "field" "service.loadBalancerSourceRanges" "cidr" .) }}
{{- end }}
{{- range .Values.trustedProxies }}
{{- $length := contains "/" . | ternary "" (contains ":" . | ternary "/128" "/32") }}
{{- $blocks = append $blocks (dict "field" "trustedProxies" "cidr" (printf "%s%s" . $length)) }}
{{- end }}
{{- range $field, $peers := pick .Values.networkPolicy "httpFrom" "metricsFrom" }}
{{- range $peers }}
{{- $blocks = append $blocks (merge (dict "field" (printf "networkPolicy.%s" $field)) (default dict .ipBlock)) }}
{{- end }}
{{- end }}
{{- range .Values.networkPolicy.egress }}
{{- range .to }}
{{- $blocks = append $blocks (merge (dict "field" "networkPolicy.egress") (default dict .ipBlock)) }}
{{- end }}
{{- range .ports }}
{{- if and .endPort (not (kindIs "string" .port)) (lt (int64 .endPort) (int64 .port)) }}
{{- fail (printf "networkPolicy.egress: expected an endPort of at least port = %d, found %d" (int64 .port) (int64 .endPort)) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $block := $blocks }}
{{- range concat (list .cidr | compact) (default list .except) }}
{{- if not (include "key-service.networkBits" .) }}
{{- fail (printf "%s: expected a network such as 192.0.2.0/24 or 2001:db8::/32, found %s" $block.field .) }}
{{- end }}
{{- end }}
{{- range .except }}
{{- $outer := include "key-service.networkBits" $block.cidr }}
{{- $inner := include "key-service.networkBits" . }}
{{- if or (eq $inner $outer) (not (hasPrefix $outer $inner)) }}
{{- fail (printf "%s: expected an except within %s, found %s" $block.field $block.cidr .) }}
{{- end }}
{{- end }}
{{- end }}

{{- with .Values.service }}
{{- $families := default list .ipFamilies }}
{{- if and .clusterIP (ne .clusterIP "None") }}
{{- $bits := include "key-service.networkBits" (printf "%s/%s" .clusterIP (contains ":" .clusterIP | ternary "128" "32")) }}
{{- if not $bits }}
{{- fail (printf "service.clusterIP: expected an address or None, found %s" .clusterIP) }}
{{- end }}
{{- if and $families (not (hasSuffix (trunc 1 $bits) (first $families))) }}
{{- fail (printf "service.clusterIP: expected an address of the first of service.ipFamilies, %s, found %s" (first $families) .clusterIP) }}
{{- end }}
{{- end }}
{{- if and (eq .clusterIP "None") .port (ne (int64 .port) (int64 $.Values.server.port)) }}
{{- fail (printf "service.port: expected server.port = %d or null for a headless Service, because its clients connect to the pods' own port, found %d" (int64 $.Values.server.port) (int64 .port)) }}
{{- end }}
{{- if and (eq .ipFamilyPolicy "SingleStack") (gt (len $families) 1) }}
{{- fail "service.ipFamilies: expected one family if service.ipFamilyPolicy is SingleStack, found two" }}
{{- end }}
{{- if and (eq $.Values.server.host "0.0.0.0") (or (has "IPv6" $families) (has .ipFamilyPolicy (list "PreferDualStack" "RequireDualStack"))) }}
{{- fail "server.host: expected * or :: for a Service with IPv6, found 0.0.0.0" }}
{{- end }}
{{- end }}
{{- end }}

{{/*
The prefix bits of a network in CIDR notation, preceded by 4 or 6 for the IP version, so that the result for a subnet begins with the
result for its network. Empty if it is not a network, or if bits after the prefix are set: Kubernetes 1.36 rejects 10.0.0.1/8.
*/}}
{{- define "key-service.networkBits" -}}
{{- $octet := "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])" }}
{{- $groups := "([0-9A-Fa-f]{1,4}(:[0-9A-Fa-f]{1,4})*)?" }}
{{- $address := splitList "/" . | first }}
{{- $length := splitList "/" . | last | int }}
{{- $bits := "" }}
{{- if regexMatch (printf "^(%s\\.){3}%s/([12]?[0-9]|3[0-2])$" $octet $octet) . }}
{{- range splitList "." $address }}
{{- $bits = printf "%s%08b" $bits (int64 .) }}
{{- end }}
{{- else if regexMatch (printf "^%s(::%s)?/([1-9]?[0-9]|1[01][0-9]|12[0-8])$" $groups $groups) . }}
{{- $missing := sub 8 (splitList ":" $address | compact | len) | int }}
{{- range $half, $text := splitList "::" $address }}
{{- if eq $half 1 }}
{{- $bits = printf "%s%s" $bits (repeat (mul 16 $missing | int) "0") }}
{{- end }}
{{- range splitList ":" $text | compact }}
{{- $bits = printf "%s%016b" $bits (printf "0x%s" . | int64) }}
{{- end }}
{{- end }}
{{- if or (ne (len $bits) 128) (and (contains "::" .) (lt $missing 1)) }}
{{- $bits = "" }}
{{- end }}
{{- end }}
{{- if and $bits (regexMatch "^0*$" (substr $length -1 $bits)) }}
{{- printf "%d%s" (eq (len $bits) 32 | ternary 4 6) (substr 0 $length $bits) }}
{{- end }}
{{- end }}

{{/* Values that the Prometheus operator would reject. */}}
{{- define "key-service.validate.monitoring" -}}
{{- with .Values.metrics.serviceMonitor }}
{{- if and .interval .scrapeTimeout (gt (include "key-service.milliseconds" .scrapeTimeout | int64) (include "key-service.milliseconds" .interval | int64)) }}
{{- fail (printf "metrics.serviceMonitor.scrapeTimeout: expected at most metrics.serviceMonitor.interval = %s, found %s" .interval .scrapeTimeout) }}
{{- end }}
{{- end }}
{{- $groups := list }}
{{- with .Values.metrics.prometheusRule }}
{{- range $file, $used := dict "recording" .recording "alerts" .alerts }}
{{- if $used }}
{{- $groups = concat $groups ($.Files.Get (printf "files/%s.yml" $file) | fromYaml).groups }}
{{- end }}
{{- end }}
{{- $names := list }}
{{- range concat $groups .extraGroups }}
{{- if has .name $names }}
{{- fail (printf "metrics.prometheusRule.extraGroups: expected unique names, found %s twice" .name) }}
{{- end }}
{{- $names = append $names .name }}
{{- end }}
{{- end }}
{{- end }}

{{/* A Prometheus duration in milliseconds. */}}
{{- define "key-service.milliseconds" -}}
{{- $units := dict "y" 31536000000 "w" 604800000 "d" 86400000 "h" 3600000 "m" 60000 "s" 1000 "ms" 1 }}
{{- $total := 0 }}
{{- range regexFindAll "[0-9]+[a-z]+" . -1 }}
{{- $unit := regexFind "[a-z]+$" . }}
{{- $total = add $total (mul (trimSuffix $unit . | int64) (index $units $unit)) }}
{{- end }}
{{- $total }}
{{- end }}
