// Lead a Node program's calls to the Claude API through the proxy of `gateway local`, whose environment names both.
//
// Node reads HTTPS_PROXY by itself only since 22.21 and 24.5; before, https and fetch go past it without a word, and since then what has
// an agent of its own. Promises that nothing
// else of the program changes: calls to other hosts take the way that they took. Preloaded by NODE_OPTIONS=--require.
"use strict";

const http = require("node:http");
const https = require("node:https");
const tls = require("node:tls");

const DISPATCHER = Symbol.for("undici.globalDispatcher.1"); // what Node's fetch sends by, and the undici package too
const upstream = process.env.GATEWAY_LOCAL_UPSTREAM; // host:port
const [major, minor] = process.versions.node.split(".").map(Number);
const reads = major > 24 || (major === 24 && minor >= 5) || (major === 22 && minor >= 21);

/** Open a tunnel to the upstream; `callback(error, socket)` gets the TLS socket in it, whose handshake is under way. */
function tunnel(options, callback) {
  const proxy = new URL(process.env.HTTPS_PROXY);
  const credentials = `${decodeURIComponent(proxy.username)}:${decodeURIComponent(proxy.password)}`;
  const headers = { host: upstream, "proxy-authorization": `Basic ${Buffer.from(credentials).toString("base64")}` };
  const asked = http.request({ host: proxy.hostname, port: proxy.port, method: "CONNECT", path: upstream, headers, agent: new http.Agent() });
  asked.once("error", callback);
  asked.once("connect", (answer, socket) => {
    if (answer.statusCode === 200) {
      callback(null, tls.connect({ ALPNProtocols: ["http/1.1"], ...options, socket, path: undefined, servername: options.servername || upstream.replace(/:\d+$/, "") }));
    } else {
      socket.destroy();
      callback(new Error(`gateway local refused a tunnel to ${upstream}: ${answer.statusCode}`));
    }
  });
  asked.end();
}

function leadHttps() {
  const direct = https.Agent.prototype.createConnection;
  https.Agent.prototype.createConnection = function createConnection(options, callback) {
    if (!callback || `${options.host}:${options.port || 443}` !== upstream) return direct.apply(this, arguments);
    tunnel(options, callback);
    return undefined;
  };
}

function leadFetch() {
  const fetch = globalThis.fetch;
  let led = false;
  globalThis.fetch = function (...parameters) {
    if (!led) {
      led = true;
      new Headers(); // loads what Node's fetch is made of, its dispatcher among it
      lead(globalThis[DISPATCHER]);
    }
    return fetch.apply(this, parameters);
  };
}

/** Let what Node's fetch sends by hand calls to the upstream to one of its kind that goes through the tunnel. */
function lead(direct) {
  if (!direct || direct.constructor.name !== "Agent") return; // an agent of the program's own, or one that reads the environment
  const connect = (options, callback) =>
    tunnel({ servername: options.servername }, (error, socket) => {
      if (error) return callback(error, null);
      socket.once("error", (failed) => callback(failed, null));
      socket.once("secureConnect", () => callback(null, socket));
    });
  const led = new direct.constructor({ connect });
  globalThis[DISPATCHER] = {
    dispatch(options, handler) {
      const { protocol, hostname, port } = new URL(options.origin);
      const isUpstream = protocol === "https:" && `${hostname}:${port || 443}` === upstream;
      return (isUpstream ? led : direct).dispatch(options, handler);
    },
    close: (...parameters) => Promise.all([led.close(), direct.close(...parameters)]),
    destroy: (...parameters) => Promise.all([led.destroy(), direct.destroy(...parameters)]),
  };
}

if (upstream && process.env.HTTPS_PROXY) {
  leadHttps(); // in every version: where Node reads the environment, an agent of the program's own still does not
  if (globalThis.fetch && !reads) leadFetch();
}
