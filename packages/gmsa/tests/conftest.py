pytest_plugins = ["shared_core.testing"]
