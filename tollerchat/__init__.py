"""A real-time chat server: one aiohttp application, messages in PostgreSQL."""

from tollerchat.app import create_app, setup
from tollerchat.config import Config
from tollerchat.errors import ConfigError

__all__ = ("Config", "ConfigError", "create_app", "setup")

__version__ = "0.1.0"
