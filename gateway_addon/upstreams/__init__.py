"""The provider's side: its API client, the credential, the shared key's limits, the usage report."""
