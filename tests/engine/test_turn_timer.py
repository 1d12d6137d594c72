"""The figures of a turn are consistent."""

from kvchat.contract import CacheMode, FinishReason
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.turn_timer import TurnTimer
from tests.support.engine_driver import Chat


def test_rates_are_tokens_by_seconds(tiny: LoadedModel) -> None:
    stats = Chat(LocalEngine(tiny), tiny).ask("Which pass is open in May?").finished.stats
    assert round(stats.decode_tok_s * stats.decode_s) == stats.generated_tokens - 1
    assert round(stats.prefill_tok_s * stats.prefill_s) == stats.prefilled_tokens
    assert 0 < stats.prefill_s <= stats.ttft_s


def test_facts_of_the_model_stand_in_the_figures(tiny: LoadedModel) -> None:
    stats = Chat(LocalEngine(tiny), tiny).ask("Which pass is open in May?").finished.stats
    facts = tiny.facts
    assert (stats.kv_dtype, stats.weights_dtype, stats.path) == (
        facts.kv_dtype,
        facts.weights_dtype,
        facts.path,
    )
    assert (stats.weights_bytes, stats.context_limit) == (facts.weights_bytes, facts.context_limit)
    assert stats.rss_bytes > stats.weights_bytes


def test_a_turn_in_which_nothing_happened_has_no_rates(tiny: LoadedModel) -> None:
    stats = TurnTimer().stats(
        CacheMode.ON,
        tiny.facts,
        FinishReason.CANCELLED,
        evaluated=0,
        kv_tokens=0,
        kv_bytes=0,
        kv_used_bytes=0,
    )
    assert (stats.prefill_tok_s, stats.decode_tok_s, stats.prefill_s, stats.decode_s) == (0, 0, 0, 0)
    assert (stats.generated_tokens, stats.finish_reason, stats.cache_mode) == (0, "cancelled", "on")


def test_time_to_first_text_waits_for_text() -> None:
    meter = TurnTimer(started=0.0)
    meter.begin_prefill()
    meter.token("")
    assert meter.first_token > 0
    assert meter.first_text == 0
    meter.token("text")
    assert meter.ttft_s == meter.first_text >= meter.first_token
    assert meter.generated == 2
