{{- define "npair.fullname" -}}
{{- $name := .Values.fullnameOverride | default .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- /* Releases may have names that Services may not have. */ -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (print $name " cannot name a Service: set fullnameOverride to small letters, digits and -, the first a letter") -}}
{{- end -}}
{{- $name -}}
{{- end }}

{{- define "npair.selector" -}}
app.kubernetes.io/name: npair
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- /* Pods of the server, but not those of tests and promotions. */ -}}
{{- define "npair.serverSelector" -}}
{{ include "npair.selector" . }}
app.kubernetes.io/component: server
{{- end }}

{{- define "npair.labels" -}}
{{ include "npair.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "npair.image" -}}
{{- with .Values.image -}}
{{ required "set image.repository, for example ghcr.io/OWNER/npair_model_api" .repository }}{{ with .tag }}:{{ . }}{{ end }}{{ with .digest }}@{{ . }}{{ end }}
{{- end }}
{{- end }}

{{- define "npair.pullPolicy" -}}
{{- .Values.image.pullPolicy | default (.Values.image.digest | empty | ternary "Always" "IfNotPresent") -}}
{{- end }}

{{- define "npair.pullSecrets" -}}
imagePullSecrets: [
  {{- range $index, $name := .Values.image.pullSecrets }}{{ if $index }}, {{ end }}{name: {{ $name }}}{{ end -}}
]
{{- end }}

{{- define "npair.serviceAccount" -}}
{{- .Values.serviceAccount.existingName | default (include "npair.fullname" .) -}}
{{- end }}

{{- /* The name of the Secret of control APIs, empty if there is none. */ -}}
{{- define "npair.controlSecret" -}}
{{- if .Values.control.existingSecret -}}
{{ .Values.control.existingSecret }}
{{- else if .Values.control.secret -}}
{{ include "npair.fullname" . }}-control
{{- end }}
{{- end }}

{{- /* Seconds until serve.py gives up a start: START_TIMEOUT and DOWNLOAD_TIMEOUT of its options. */ -}}
{{- define "npair.startSeconds" -}}
{{- .Values.server.startSeconds | default (.Values.models.store | empty | ternary 120 900) -}}
{{- end }}

{{- define "npair.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "npair.containerSecurity" -}}
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- /* docs/proxy/npair.conf, for a container without root whose disk cannot be written. */ -}}
{{- define "npair.proxyConfiguration" -}}
{{- .Files.Get "npair.conf" | replace "listen 443 " "listen 8443 " | replace "/var/log/nginx/npair.log" "/dev/stdout" }}
{{- end }}

{{- define "npair.proxyContainer" -}}
- name: proxy
  image: {{ .Values.proxy.image }}
  command: [nginx, -g, daemon off;]
  ports:
    - {name: https, protocol: TCP, containerPort: 8443}
  readinessProbe:
    tcpSocket: {port: https}
    periodSeconds: 5
  lifecycle:
    preStop: {exec: {command: [sleep, {{ .Values.preStopSeconds | quote }}]}}
  securityContext: {{- include "npair.containerSecurity" . | nindent 4 }}
  resources: {{- toYaml .Values.proxy.resources | nindent 4 }}
  volumeMounts:
    - {name: proxy-tmp, mountPath: /tmp}
    - {name: proxy, mountPath: /etc/nginx/conf.d, readOnly: true}
    - {name: proxy-keys, mountPath: /etc/nginx/npair-keys.conf, subPath: keys, readOnly: true}
    - {name: proxy-tls, mountPath: /etc/nginx/npair.crt, subPath: tls.crt, readOnly: true}
    - {name: proxy-tls, mountPath: /etc/nginx/npair.key, subPath: tls.key, readOnly: true}
{{- end }}

{{- define "npair.proxyVolumes" -}}
{{- $keys := .Values.proxy.keysSecret | default (print (include "npair.fullname" .) "-keys") -}}
- name: proxy-tmp
  emptyDir: {sizeLimit: 4Gi}
- name: proxy
  configMap: {name: {{ include "npair.fullname" . }}-proxy}
- name: proxy-keys
  secret: {secretName: {{ $keys }}, defaultMode: 0440}
- name: proxy-tls
  secret: {secretName: {{ .Values.proxy.tlsSecret }}, defaultMode: 0440}
{{- end }}
