"""A real-time chat server: one aiohttp application, messages in PostgreSQL."""

from tollerchat.app import RUNNER_OPTIONS, create_app, post_message, setup
from tollerchat.config import Config
from tollerchat.errors import ChatError, ConfigError

__all__ = ("RUNNER_OPTIONS", "ChatError", "Config", "ConfigError", "create_app", "post_message", "setup")

__version__ = "0.1.0"
