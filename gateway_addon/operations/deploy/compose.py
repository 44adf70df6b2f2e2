"""Texts that run several gateways as one: nginx's configuration in front of them, and a compose file of the whole. Pure.

What nginx's directives do: https://nginx.org/en/docs/http/ngx_http_proxy_module.html; the compose file's keys:
https://github.com/compose-spec/compose-spec/blob/main/spec.md
"""

NGINX = """\
# TLS and one address in front of two gateways (nginx 1.22 or later): gateway init --nginx > front/nginx.conf
# To replace a gateway without losing a call: write `down` behind its address below and `nginx -s reload` (calls in flight stay where
# they are), stop it (it ends when they have), start the new one, take the word away again, reload.
pid /tmp/nginx.pid;
worker_processes auto;
error_log stderr warn;
events {
    worker_connections 4096;
}

http {
    access_log off;  # the gateways log each call
    server_tokens off;
    client_body_temp_path /tmp/body;
    proxy_temp_path /tmp/proxy;
    fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi;
    scgi_temp_path /tmp/scgi;

    upstream gateways {
        zone gateways 64k;  # what one worker learns of them, all know
        least_conn;         # a stream of minutes counts for longer than a short call
        server 172.30.80.11:8080 max_fails=1 fail_timeout=5s;
        server 172.30.80.12:8080 max_fails=1 fail_timeout=5s;
        keepalive 64;
    }

    server {
        listen 8443 ssl;
        ssl_certificate /run/secrets/tls_cert;
        ssl_certificate_key /run/secrets/tls_key;
        ssl_protocols TLSv1.2 TLSv1.3;

        client_max_body_size 40m;     # beyond the gateway's own limit, which it says in the API's shape
        client_body_buffer_size 1m;
        large_client_header_buffers 4 64k;

        location / {
            proxy_pass http://gateways;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $remote_addr;  # `trusted_proxies` in gateway.yaml names this nginx
            proxy_buffering off;                            # each event of a stream as it comes
            proxy_buffer_size 16k;                          # the headers of an answer
            proxy_buffers 4 16k;
            proxy_connect_timeout 3s;
            proxy_send_timeout 60s;
            proxy_read_timeout 11m;                         # longer than the gateway itself waits: `timeouts` in gateway.yaml

            # The other gateway is tried where a connection could not be made. A POST that was sent is never sent again: it may have
            # been billed. Only `non_idempotent` would do that, so it must not stand here.
            proxy_next_upstream error timeout;
            proxy_next_upstream_tries 2;

            error_page 502 504 = @away;  # of nginx's own: what a gateway answers passes as it is
        }

        location @away {
            default_type application/json;
            add_header X-Gateway-Refusal front always;
            return 502 '{"type":"error","error":{"type":"api_error","message":"No gateway answered. Try again shortly."}}';
        }
    }
}
"""

COMPOSE = """\
# Two gateways on one ledger behind one address with TLS. In the project's folder, once:
#   gateway init --container > Containerfile; gateway init --compose > compose.yaml
#   mkdir front; gateway init --nginx > front/nginx.conf
#   mkdir -m 700 secrets, and in it, readable in there for the containers (chmod 444):
#     anthropic_key, ledger_password (openssl rand -hex 24), tls_cert and tls_key (PEM)
#   in policies/gateway.yaml: key: {file: /run/secrets/anthropic_key} and trusted_proxies: [172.30.80.2]
#   docker compose up -d --build
# Commands on its ledger: docker compose run --rm commands token issue APP
# To replace a gateway without losing a call, see the head of front/nginx.conf; nginx -s reload is
#   docker compose exec front nginx -c /etc/nginx/gateway/nginx.conf -s reload
name: gateway

x-hardened: &hardened
  read_only: true
  cap_drop: [ALL]
  security_opt: ["no-new-privileges:true"]
  restart: unless-stopped

x-gateway: &gateway
  <<: *hardened
  image: gateway
  build:
    context: .
    dockerfile: Containerfile
    args: {PACKAGES: "psycopg[binary]>=3.3.9 psycopg-pool>=3.2"}
  user: "10001:10001"
  environment:
    GATEWAY_LEDGER: postgresql://gateway@ledger/gateway
    GATEWAY_POLICIES: /etc/gateway/policies
    GATEWAY_LISTEN: 0.0.0.0:8080
  entrypoint:
    - sh
    - -c
    - export PGPASSWORD="$$(cat /run/secrets/ledger_password)"; exec python -O -m gateway_addon "$$@"
    - gateway
  command: [serve, --insecure-listen, --log, json]  # in clear to nginx alone, on a network of their own
  secrets: [anthropic_key, ledger_password]
  tmpfs: [/tmp]
  healthcheck:
    test: [CMD, python, -c, "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/gateway/readyz', timeout=2)"]
    interval: 10s
    timeout: 5s
    retries: 3
    start_period: 20s
  stop_grace_period: 90s  # `timeouts.drain` in gateway.yaml (60 s unless set), and some more
  depends_on:
    ledger: {condition: service_healthy}
    commands: {condition: service_completed_successfully}

services:
  ledger:
    <<: *hardened
    image: docker.io/library/postgres:17-alpine
    user: "70:70"
    environment:
      POSTGRES_USER: gateway
      POSTGRES_DB: gateway
      POSTGRES_PASSWORD_FILE: /run/secrets/ledger_password
    secrets: [ledger_password]
    volumes: ["ledger:/var/lib/postgresql/data"]
    tmpfs: [/tmp, /var/run/postgresql]
    networks: [inside]
    healthcheck:
      test: [CMD, pg_isready, -U, gateway, -d, gateway]
      interval: 5s
      timeout: 3s
      retries: 10
    stop_grace_period: 60s

  commands:  # makes the ledger's tables, and ends
    <<: *gateway
    command: [init, --yes]
    volumes: ["./policies:/etc/gateway/policies:ro"]
    networks: [inside]
    restart: "no"
    healthcheck: {disable: true}
    depends_on:
      ledger: {condition: service_healthy}

  gateway-1:
    <<: *gateway
    volumes: ["./policies:/etc/gateway/policies:ro", "gateway-1:/var/lib/gateway"]
    networks:
      inside: {ipv4_address: 172.30.80.11}
      outside: {}

  gateway-2:
    <<: *gateway
    volumes: ["./policies:/etc/gateway/policies:ro", "gateway-2:/var/lib/gateway"]
    networks:
      inside: {ipv4_address: 172.30.80.12}
      outside: {}

  front:
    <<: *hardened
    image: docker.io/nginxinc/nginx-unprivileged:stable-alpine
    user: "101:101"
    command: [nginx, -c, /etc/nginx/gateway/nginx.conf, -g, "daemon off;"]
    volumes: ["./front:/etc/nginx/gateway:ro"]
    secrets: [tls_cert, tls_key]
    tmpfs: [/tmp]
    ports: ["443:8443"]
    networks:
      inside: {ipv4_address: 172.30.80.2}
      edge: {}
    healthcheck:
      test: [CMD, wget, -q, --no-check-certificate, -O, /dev/null, "https://127.0.0.1:8443/gateway/readyz"]
      interval: 10s
      timeout: 5s
      retries: 3
    depends_on: [gateway-1, gateway-2]

networks:
  inside:  # nothing on it reaches the world or is reached from there
    internal: true
    ipam:
      config: [{subnet: 172.30.80.0/24}]
  outside: {}  # by it the gateways reach the Claude API
  edge: {}     # by it nginx is reached

volumes:
  ledger: {}
  gateway-1: {}
  gateway-2: {}

secrets:
  anthropic_key: {file: ./secrets/anthropic_key}
  ledger_password: {file: ./secrets/ledger_password}
  tls_cert: {file: ./secrets/tls_cert}
  tls_key: {file: ./secrets/tls_key}
"""
