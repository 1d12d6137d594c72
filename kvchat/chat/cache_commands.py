"""Commands that change how a conversation is cached."""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from kvchat.chat.wording import BITS, policy_words
from kvchat.contract import CacheMode, EvictionPolicy, KVPrecision, SetBudget, SetPrecision
from kvchat.text import megabytes, one_line, parse_size

if TYPE_CHECKING:
    from kvchat.chat.controller import ChatController


def mode(chat: "ChatController", name: str) -> None:
    """Sets the cache mode, or takes the next one."""
    modes = list(CacheMode)
    following = modes[(modes.index(chat.session.current.mode) + 1) % len(modes)]
    if name and name not in set(CacheMode):
        chat.port.say(f"The cache modes are on, turn and off; not {one_line(name)}.")
        return
    chat.session.configure(mode=CacheMode(name) if name else following)
    chat.port.tell(f"The cache is {chat.session.current.mode.value} from the next turn on.")


def policy(chat: "ChatController", name: str) -> None:
    """Chooses what is dropped when the context is full; says what that would be."""
    if name not in set(EvictionPolicy):
        now = chat.session.current.policy
        chat.port.say(_choice("When the context is full", now, "/policy", EvictionPolicy, name))
        return
    chosen = EvictionPolicy(name)
    act = partial(chat.session.configure, policy=chosen)
    chat.costs.change(f"Policy {chosen}", chat.costs.next_turn(policy=chosen), act, policy_words)


def precision(chat: "ChatController", name: str) -> None:
    """Stores keys and values in another precision; what is cached is converted.

    A cache can only be rounded: more bits, or a cache on disk, mean reading again.
    """
    if name not in set(KVPrecision):
        chat.port.say(_choice("Keys and values", chat.session.current.kv, "/kv", KVPrecision, name))
        return
    kv = KVPrecision(name)
    if _can_be_rounded(chat, kv):
        _set_precision(chat, kv)
    else:
        request = chat.costs.next_turn(kv=kv)
        chat.costs.change(f"KV precision {kv}", request, partial(_set_precision, chat, kv))


def budget(chat: "ChatController", size: str) -> None:
    """Changes how much memory all caches may take; asks for the size without one."""
    question = "Memory for all KV caches, such as 2GB or 512MB"
    if size:
        set_budget(chat, size)
    else:
        act = partial(_set_budget_if_given, chat)
        chat.port.ask_line(question, "", act, "A budget is a size, such as 2GB or 512MB.")


def set_budget(chat: "ChatController", size: str) -> None:
    """Changes how much memory all caches may take; an engine that starts later gets the same budget."""
    try:
        wanted = parse_size(size)
    except (ValueError, OverflowError):
        wanted = 0
    if not wanted:
        chat.port.say("A budget is a size, such as 2GB or 512MB.")
        return
    chat.budget = SetBudget(wanted)
    chat.engine.command(chat.budget)
    chat.port.say(f"All KV caches together may take {megabytes(wanted)} of memory.")


def _set_budget_if_given(chat: "ChatController", size: str) -> None:
    if size:
        set_budget(chat, size)


def _can_be_rounded(chat: "ChatController", kv: KVPrecision) -> bool:
    """Whether the open conversation's cache, if there is one, can be stored so as it is."""
    cache = chat.state.caches.get(chat.session.current.id)
    model = chat.state.model
    if cache is None or model is None or not chat.state.ready:
        return True
    wanted = model.kv_dtype if kv is KVPrecision.AUTO else kv.value
    return cache.hot and BITS.get(wanted, 0) <= BITS.get(cache.kv_dtype, 0)


def _set_precision(chat: "ChatController", kv: KVPrecision) -> None:
    chat.session.configure(kv=kv)
    chat.engine.command(SetPrecision(chat.session.current.id, kv))


def _choice(what: str, now: str, command: str, names: Iterable[str], given: str) -> str:
    """What is chosen and what could be; and that `given`, if anything, is none of it."""
    wrong = f"{given} is none of them. " if given else ""
    return f"{wrong}{what}: {now}. {command} {'|'.join(names)} changes that."
