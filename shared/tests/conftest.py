"""The shared test frame: no network, TENFOLD_DATA, gloo processes, command lines."""

pytest_plugins = ["shared_core.testing"]
