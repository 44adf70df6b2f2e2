// A real OpenID provider that issues identity tokens to workloads: `node oidc_provider.mjs PORT KID AUDIENCE`, in a folder with the package.
// It signs with a new key of that name, so that starting it again rotates its keys.
import { generateKeyPairSync } from 'node:crypto';
import Provider from 'oidc-provider';

const [port, kid, audience] = process.argv.slice(2);
const signing = { ...generateKeyPairSync('rsa', { modulusLength: 2048 }).privateKey.export({ format: 'jwk' }), kid, alg: 'RS256', use: 'sig' };
const job = (client_id) => ({
  client_id,
  client_secret: `secret-of-${client_id}`,
  grant_types: ['client_credentials'],
  redirect_uris: [],
  response_types: [],
});
const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: [job('nightly'), job('stranger')],
  jwks: { keys: [signing] },
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: false },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (_, resource) => ({
        scope: 'infer', audience: resource, accessTokenTTL: 300, accessTokenFormat: 'jwt', jwt: { sign: { alg: 'RS256' } },
      }),
      defaultResource: () => audience,
    },
  },
});
provider.listen(Number(port), '127.0.0.1', () => console.log('listening'));
