"""TLS as a service on the open network offers it: who we are, whom we believe, and what is agreed on."""
