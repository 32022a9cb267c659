"""Bounds how often connections that prove nothing are served. Pure: time arrives as a value.

    arrival ──takes one──▶ allowance of its address   none left: the address is shut out,
       │                   allowance of all unknown   none left: all that are not known are,
       │                   addresses together         until half of it is there again
       └──proves the secret──▶ gives it back; its address is known from now on

So those that know the secret cost nothing, however often they connect. An address from which the
secret was proved has a larger allowance of its own, and strangers elsewhere cannot use it up.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import NamedTuple

from flexkv.cluster.allowance import Account, Allowance

KNOWN_MAX = 512
"""How many known addresses are remembered: those that proved the secret last."""
ACCOUNTS_MAX = 1024
"""Once there are this many accounts, those whose allowance is full are dropped."""


class StrangerLimits(NamedTuple):
    """What strangers may cost.

    Attributes:
        unknown: of each address from which nobody has proved the secret.
        known: of each address from which somebody has.
        all_unknown: of all unknown addresses together.
    """

    unknown: Allowance = Allowance(32, 4.0)
    known: Allowance = Allowance(64, 20.0)
    all_unknown: Allowance = Allowance(128, 40.0)


LIMITS = StrangerLimits()
"""A connection that proves nothing costs about 0.3 ms of CPU time, so that these cost less than 2 %
of a core, for each known address that is hostile and all unknown ones together."""


def source_of(ip: str) -> bytes:
    """Return what counts as one address: 4 bytes, or the network of an IPv6 address, 8 bytes."""
    address = ip_address(ip.partition("%")[0])
    if isinstance(address, IPv6Address):
        return address.packed[:8] if address.ipv4_mapped is None else address.ipv4_mapped.packed
    return address.packed


def _named(source: bytes) -> str:
    if len(source) == 4:
        return str(ip_address(source))
    return f"{ip_address(source + bytes(8))}/64"


class _Account(Account):
    """An account that is shut once it is used up, until half of it is there again."""

    __slots__ = ("_is_shut",)

    def __init__(self, allowance: Allowance, now_s: float) -> None:
        super().__init__(allowance, now_s)
        self._is_shut = False

    def arrive(self, now_s: float) -> None:
        """Take one; the account is shut if another one cannot be taken."""
        self.take(1, now_s)
        self._is_shut = self.lacks_s(1, now_s) > 0

    def shut_s(self, now_s: float) -> float:
        """Return for how many seconds more nothing may be taken; 0 if something may be."""
        lacks_s = self.lacks_s(self.allowance.burst / 2, now_s)
        self._is_shut = self._is_shut and lacks_s > 0
        return lacks_s if self._is_shut else 0.0


class Arrival(NamedTuple):
    """A connection that has proved nothing yet, and the accounts that it was taken from."""

    source: bytes
    accounts: tuple[_Account, ...]


class ShutOut(NamedTuple):
    """Whose connections are not accepted now.

    Attributes:
        sources: the addresses that are shut out; or, if all unknown ones are, those that are not.
        is_all: whether all are shut out but `sources`.
    """

    sources: frozenset[bytes] = frozenset()
    is_all: bool = False

    def named(self) -> str:
        """Return the addresses for a log line."""
        if self.is_all:
            return f"all but {len(self.sources)} known ones"
        return ", ".join(sorted(_named(source) for source in self.sources))


class Strangers:
    """The accounts of all addresses."""

    def __init__(self, limits: StrangerLimits | None = None) -> None:
        """Allow everything; without limits, take `LIMITS`."""
        self._limits = LIMITS if limits is None else limits
        self._all: _Account | None = None
        self._accounts: dict[bytes, _Account] = {}
        self._shut: dict[bytes, _Account] = {}
        """Accounts that were shut when something was last taken from them."""
        self._known: dict[bytes, None] = {}

    def arrived(self, source: bytes, now_s: float) -> Arrival | None:
        """Count a connection from an address; return None if it must not be served."""
        is_known = source in self._known
        if self._all is None:
            self._all = _Account(self._limits.all_unknown, now_s)
        if not is_known and self._all.shut_s(now_s) > 0:
            return None
        own = self._account(source, is_known, now_s)
        if own.shut_s(now_s) > 0:
            return None
        accounts = (own,) if is_known else (own, self._all)
        for account in accounts:
            account.arrive(now_s)
        if own.shut_s(now_s) > 0:
            self._shut[source] = own
        return Arrival(source, accounts)

    def proved(self, arrival: Arrival, now_s: float) -> None:
        """Take note that a connection has proved the secret."""
        for account in arrival.accounts:
            account.give_back(1)
        source = arrival.source
        if source not in self._known:
            self._accounts[source] = _Account(self._limits.known, now_s)
            self._shut.pop(source, None)
        self._known.pop(source, None)
        self._known[source] = None
        if len(self._known) > KNOWN_MAX:
            oldest = next(iter(self._known))
            del self._known[oldest]
            self._accounts.pop(oldest, None)
            self._shut.pop(oldest, None)

    def shut_out(self, now_s: float) -> tuple[ShutOut, float]:
        """Return who is shut out, and for how many seconds at least: 0 if nobody is."""
        lasts_s = {}
        for source, account in list(self._shut.items()):
            if (left_s := account.shut_s(now_s)) > 0:
                lasts_s[source] = left_s
            else:
                del self._shut[source]
        shut = frozenset(lasts_s)
        all_s = 0.0 if self._all is None else self._all.shut_s(now_s)
        if all_s > 0:
            least_s = min([all_s, *lasts_s.values()])
            return ShutOut(frozenset(self._known) - shut, is_all=True), least_s
        return ShutOut(shut), min(lasts_s.values(), default=0.0)

    def _account(self, source: bytes, is_known: bool, now_s: float) -> _Account:
        account = self._accounts.get(source)
        if account is None:
            if len(self._accounts) >= ACCOUNTS_MAX:
                self._accounts = {
                    each: of for each, of in self._accounts.items() if not of.is_full(now_s)
                }
            allowance = self._limits.known if is_known else self._limits.unknown
            account = self._accounts[source] = _Account(allowance, now_s)
        return account
