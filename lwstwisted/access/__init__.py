"""Who may do what: who somebody is, which rules there are, URLs that are signed, and names that lead here."""
