"""The commands: noisepolicy-train, -generate, -eval, -export, -bench and -reward-server."""

from noisepolicy.cli.threads import configure_threads

configure_threads()  # here, because every command imports this package before torch
