"""Who calls: tokens, the client's address, and the throttle of failed attempts."""
