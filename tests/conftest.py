"""The workspace's tests share what every package's tests share."""

pytest_plugins = ["shared_core.testing"]
