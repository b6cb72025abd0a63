"""Telling an application what happens to uploads, and asking it first: the hooks of tusd, as commands and over HTTP."""
