"""A real-time chat server: one aiohttp application, messages in PostgreSQL."""

from tollerchat.app import RUNNER_OPTIONS, create_app, setup
from tollerchat.config import Config
from tollerchat.errors import ConfigError

__all__ = ("RUNNER_OPTIONS", "Config", "ConfigError", "create_app", "setup")

__version__ = "0.1.0"
