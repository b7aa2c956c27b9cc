# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What a handler has to say of sites that are left shared: one warning for one cause."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pyro_flipout.errors import users_line, warn

__all__ = ["Notices", "by_reason", "cause", "named"]


@dataclass
class _Notice:
    sites: list[str]
    verb: str
    reason: str
    keys: list[str]
    at: tuple[str, int]

    def __str__(self) -> str:
        draws = "its shared draw" if len(self.sites) == 1 else "their shared draws"
        return f"{named(self.sites)} {self._verb} {draws}{self.verb}: {self.reason}"

    @property
    def _verb(self) -> str:
        return "keeps" if len(self.sites) == 1 else "keep"


class Notices:
    """Warnings that are kept until an execution ends, so that each names all of its sites.

    :ivar told: keys of what was said or is about to be.
    """

    def __init__(self) -> None:
        self.told: set[str] = set()
        self._waiting: dict[tuple[str, str], _Notice] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def tell(self, key: str, message: str) -> None:
        """Says something now, once for each key."""
        if key not in self.told:
            self.told.add(key)
            warn(message)

    def leave(
        self, key: str, site: str, reason: str, verb: str = "", *, alone: bool = False, wait: bool
    ) -> None:
        """Says that a site is left shared, once for each key.

        :param verb: what comes behind "keeps its shared draw".
        :param alone: the remedy is for this site and no other.
        :param wait: until :meth:`say`, for other sites that are for the same reason.
        """
        kind = verb, f"{key}: {reason}" if alone else cause(reason)
        notice = self._waiting.get(kind)
        if notice is not None:
            if site not in notice.sites:
                notice.sites.append(site)
            notice.keys.append(key)
            self.told.add(key)
        elif key not in self.told:
            self.told.add(key)
            notice = _Notice([site], verb, reason, [key], users_line())
            if wait:
                self._waiting[kind] = notice
            else:
                warn(str(notice), notice.at)

    def say(self) -> None:
        """Says what waits."""
        waiting, self._waiting = self._waiting, {}
        for notice in waiting.values():
            warn(str(notice), notice.at)

    def drop(self) -> None:
        """Forgets what waits, which will be said when it comes up again."""
        for notice in self._waiting.values():
            self.told.difference_update(notice.keys)
        self._waiting.clear()


def cause(reason: str) -> str:
    """A reason without the names, shapes and numbers of the site that it is about."""
    reason = re.sub(r"'[^']*'|\[[^\]]*\]|\d+", "#", reason)
    return re.sub(r"\((\(?#[#, ()]*)(\.\.\.)?\)", "#", reason)  # lists of elements


def named(sites: Iterable[str]) -> str:
    """Names of sites, for a message."""
    sites = list(sites)
    return f"site '{sites[0]}'" if len(sites) == 1 else f"sites {sites}"


def by_reason(decisions: Mapping[str, str]) -> str:
    """Decisions on sites, for a message, with the sites of one decision together."""
    found: dict[str, list[str]] = {}
    for site, decision in decisions.items():
        found.setdefault(decision.removeprefix("shared: "), []).append(site)
    return "; ".join(f"{named(sites)}: {reason}" for reason, sites in found.items())
