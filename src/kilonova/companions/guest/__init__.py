"""The guest image: a small cloud guest that Kilonova builds itself, from packages of the Debian it runs on."""

from kilonova.companions.guest.build import GuestImage, build

HOST_PACKAGES: tuple[str, ...] = ()
"""Debian packages that must be installed on the host to build: none. What is needed beside apt and dpkg (mke2fs) is
taken from its package into the cache and run from there, so an ordinary user can build on a bare machine."""

__all__ = ["HOST_PACKAGES", "GuestImage", "build"]
