"""Tokens: JWT -> user id and expiry."""

import functools
import math
import time
from typing import Any, NamedTuple

import jwt

from tollerchat.config import Config
from tollerchat.errors import ConfigError, Unauthorized
from tollerchat.protocol import MAX_ID

__all__ = ("Identity", "issue_token", "verify_token")

MAX_REMEMBERED = 2048  # characters of a token
EXPIRED = "the token has expired: get a new one"

# The contract says nothing about audience, and `sub` is checked below.
_OPTIONS: Any = {"verify_aud": False, "verify_sub": False, "verify_jti": False}


class Identity(NamedTuple):
    """Who a token stands for, and until when (Unix time, seconds; infinity without `exp`)."""

    user_id: int
    expires_at: float


def verify_token(token: str, config: Config) -> Identity:
    """Check signature, algorithm and dates of a JWT (RFC 7519) and return its user.

    Raises `Unauthorized`; its text never contains any part of the token.
    """
    verify = _verify if len(token) <= MAX_REMEMBERED else _verify.__wrapped__
    identity = verify(token, config.jwt_secret, config.jwt_algorithms)
    if identity.expires_at <= time.time():
        raise Unauthorized(EXPIRED)
    return identity


# After a restart or an outage of the network, the same tokens come back all at once, again and again.
@functools.lru_cache(maxsize=10_000)
def _verify(token: str, secret: str, algorithms: tuple[str, ...]) -> Identity:
    try:
        claims = jwt.decode(token, secret, algorithms=list(algorithms), options=_OPTIONS)
        return Identity(_user_id(claims), float(claims.get("exp", math.inf)))
    except jwt.ExpiredSignatureError:
        raise Unauthorized(EXPIRED) from None
    except (jwt.ImmatureSignatureError, jwt.InvalidIssuedAtError):
        raise Unauthorized("the token is not valid yet: check the clock of its issuer") from None
    except jwt.InvalidAlgorithmError:
        raise Unauthorized(f"the token's algorithm must be {' or '.join(algorithms)}") from None
    except jwt.InvalidSignatureError:
        raise Unauthorized("the token's signature does not match: it was made with another secret") from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
        raise Unauthorized("the token is not a valid JWT") from None


def _user_id(claims: dict[str, Any]) -> int:
    if "user_id" in claims:
        user_id = claims["user_id"]
        if type(user_id) is not int:  # not isinstance: True is an int too
            raise Unauthorized("the token's user_id must be an integer")
    else:
        subject = claims.get("sub")
        if not (isinstance(subject, str) and subject.isascii() and subject.isdigit() and len(subject) <= 19):
            raise Unauthorized("the token has no user: it needs an integer user_id, or a sub of digits")
        user_id = int(subject)
    if not 1 <= user_id <= MAX_ID:
        raise Unauthorized(f"the token's user id is out of range: it must be 1 to {MAX_ID}")
    return int(user_id)


def issue_token(user_id: int, config: Config, *, ttl: float) -> str:
    """A token for `user_id` that is valid for `ttl` seconds, for trying things out and for tests.

    Raises `ConfigError` where the key is one that can only verify.
    """
    now = int(time.time())
    claims = {"user_id": user_id, "iat": now, "exp": now + int(ttl)}
    algorithm = config.jwt_algorithms[0]
    try:
        return jwt.encode(claims, config.jwt_secret, algorithm=algorithm)
    except (AttributeError, TypeError, ValueError, jwt.PyJWTError):  # PyJWT has no one error for it
        raise ConfigError(
            f"JWT_SECRET cannot sign tokens with {algorithm}: it needs the private key"
        ) from None
