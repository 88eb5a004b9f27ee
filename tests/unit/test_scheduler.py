"""Scheduling decisions, step by step, on pretended ranks that check every plan (tests/fakes.py: PlanChecker)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from nmoe_backend.scheduler import Scheduler
from nmoe_backend.types import ErrorKind, RankError, RankOutput, RequestError
from tests.fakes import CollectingSink, expected_tokens, make_limits, make_request
from tests.stepping import Steps, only


def test_plan_matches_the_example_of_the_contract() -> None:
    """types.RankPlan's, with slot 0 in place of 2 and 1 in place of 0."""
    steps = Steps(make_limits(num_ranks=1, page_size=4))
    steps.add(1, 9)
    steps.step()
    steps.add(2, 6)
    share = only(steps.step())
    assert (list(share.slots), list(share.starts), list(share.lengths)) == ([0, 1], [9, 0], [1, 6])
    assert share.num_decode == 1 and len(share.token_ids) == 6 and list(share.samples) == [True, True]
    assert [(slot, idx) for slot, idx, _ in share.new_pages] == [(1, 0), (1, 1)]
    assert [init.slot for init in share.admitted] == [1]


def test_step_is_planned_before_the_one_before_is_committed() -> None:
    steps = Steps(make_limits(num_ranks=1))
    steps.add(1, 3, max_tokens=3)
    scheduler = steps.scheduler
    plans = [scheduler.schedule() for _ in range(4)]
    assert [only(plan).starts[0] for plan in plans[:3]] == [0, 3, 4]
    assert plans[3] is None, "a row past max_tokens would have been planned"


def test_stop_token_discards_the_row_that_was_planned_ahead() -> None:
    limits = make_limits(num_ranks=1)
    probe = expected_tokens(make_request(1, [7, 8, 9], 10), limits)
    steps = Steps(limits)
    sink = steps.add(1, 3, max_tokens=10, stop_token_ids=(probe[2],))
    assert [(1 * 7 + i) % 100 for i in range(3)] == [7, 8, 9]
    steps.run()
    assert sink.token_ids == probe[:3] and sink.finish_reason == "stop"
    assert steps.scheduler.generation_tokens_total == 3
    assert steps.scheduler.ranks[0].pool.num_used == 0


def test_min_tokens_holds_the_stop_check_back_and_ignore_eos_turns_it_off() -> None:
    def always_seven(history: object, vocab_size: int) -> int:
        return 7

    steps = Steps(make_limits(num_ranks=1, eos_token_ids=(7,)))
    steps.checkers[0].token_fn = always_seven
    plain = steps.add(1, 2, max_tokens=6)
    held = steps.add(2, 2, max_tokens=6, min_tokens=3)
    ignoring = steps.add(3, 2, max_tokens=6, ignore_eos=True)
    steps.run()
    assert (plain.token_ids, plain.finish_reason) == ([7], "stop")
    assert (held.token_ids, held.finish_reason) == ([7] * 4, "stop")
    assert (ignoring.token_ids, ignoring.finish_reason) == ([7] * 6, "length")


def test_slot_init_names_every_id_that_ends_the_sequence() -> None:
    steps = Steps(make_limits(num_ranks=1, eos_token_ids=(7, 8)))
    steps.add(1, 2, stop_token_ids=(9,))
    steps.add(2, 2, stop_token_ids=(9,), ignore_eos=True)
    inits = only(steps.step()).admitted
    assert [sorted(init.stop_token_ids) for init in inits] == [[7, 8, 9], [9]]


def test_max_tokens_zero_prefills_and_closes() -> None:
    steps = Steps(make_limits(num_ranks=1))
    sink = steps.add(1, 20, max_tokens=0, num_prompt_logprobs=0)
    steps.run()
    assert sink.finish_reason == "length" and sink.token_ids == []
    assert sink.prompt_logprobs is not None and len(sink.prompt_logprobs) == 19


def test_embedding_is_put_and_closed_as_stop() -> None:
    steps = Steps(make_limits(num_ranks=1))
    sink = steps.add(1, 20, max_tokens=0, embed=True)
    steps.run()
    assert sink.embedding == [float(sum((7 + i) % 100 for i in range(20)))]
    assert sink.finish_reason == "stop"


def test_prompt_logprobs_come_once_before_the_first_token_across_chunks_and_preemptions() -> None:
    limits = make_limits(num_ranks=1, num_pages=16, max_prefill_tokens=5)
    steps = Steps(limits)
    older = [steps.add(i, 4, max_tokens=30) for i in range(1, 3)]
    for _ in range(3):
        steps.step()
    sink = steps.add(9, 18, max_tokens=8, num_prompt_logprobs=0)
    steps.run()
    assert all(one.finish_reason == "length" for one in older)
    assert steps.scheduler.preemptions_total > 0
    assert sink.prompt_logprobs is not None  # CollectingSink asserts once, and before the first token
    assert [entry.logprob for entry in sink.prompt_logprobs] == [-float(i) for i in range(1, 18)]


def test_logprobs_travel_with_their_tokens() -> None:
    steps = Steps(make_limits(num_ranks=1))
    plain, asked = steps.add(1, 3), steps.add(2, 5, num_logprobs=2)
    steps.run()
    assert plain.logprobs == [None] * 4
    assert [entry and (entry.token_id, entry.logprob) for entry in asked.logprobs] == [
        (token, -float(5 + i)) for i, token in enumerate(asked.token_ids)
    ]


def test_cancel_frees_slot_and_pages_for_the_very_next_plan() -> None:
    limits = make_limits(num_ranks=1, num_pages=16, max_batch_size=1)
    steps = Steps(limits)
    first, second = steps.add(1, 40, max_tokens=20), steps.add(2, 40, max_tokens=2)
    for _ in range(5):
        steps.step()
    assert steps.scheduler.abort(1, "cancelled")
    assert steps.scheduler.ranks[0].pool.num_used == 0
    assert [init.prompt_ids[0] for init in only(steps.step()).admitted] == [14]
    steps.run()
    assert first.finish_reason == "cancelled" and second.finish_reason == "length"
    assert not steps.scheduler.abort(1, "cancelled"), "it is not live any more"


def test_higher_priority_first_then_arrival() -> None:
    steps = Steps(make_limits(num_ranks=1, max_batch_size=1))
    sinks = {i: steps.add(i, 4, max_tokens=1, priority=priority) for i, priority in [(1, 0), (2, 0), (3, 5), (4, 5)]}
    ended: list[int] = []
    while len(ended) < 4:
        steps.step()
        ended += [i for i, sink in sinks.items() if sink.is_done and i not in ended]
    assert ended == [3, 4, 1, 2]


def test_the_last_in_order_is_preempted_and_the_first_never() -> None:
    limits = make_limits(num_ranks=1, num_pages=16, max_seq_len=60, max_batch_size=4)
    steps = Steps(limits)
    sinks = {i: steps.add(i, 8, max_tokens=40) for i in (1, 2, 3)}
    steps.step()
    late_but_important = steps.add(4, 8, max_tokens=40, priority=1)
    preempted: set[int] = set()
    for _ in range(500):
        steps.step()
        waiting = {entry[1].request.request_id for entry in steps.scheduler.planner._queue if not entry[1].is_new}
        preempted |= waiting
        if steps.scheduler.num_live == 0:
            break
    assert 3 in preempted and 4 not in preempted
    order = {
        i: expected_tokens(make_request(i, [(i * 7 + k) % 100 for k in range(8)], 40), limits) for i in (1, 2, 3, 4)
    }
    assert {**{i: sink.token_ids for i, sink in sinks.items()}, 4: late_but_important.token_ids} == order


def test_preempted_sequence_resumes_with_its_outputs_as_known_tokens() -> None:
    limits = make_limits(num_ranks=1, num_pages=15, max_seq_len=60)
    steps = Steps(limits)
    sinks = [steps.add(i, 8, max_tokens=40) for i in (1, 2)]
    resumed = []
    for _ in range(300):
        plan = steps.step()
        if plan is not None:
            resumed += [init for init in plan.ranks[0].admitted if init.output_ids]
    assert resumed and steps.scheduler.preemptions_total == len(resumed)
    assert all(init.output_ids == tuple(sinks[1].token_ids[: len(init.output_ids)]) for init in resumed)
    assert all(sink.finish_reason == "length" and len(sink.token_ids) == 40 for sink in sinks)


def test_pages_of_a_row_that_is_preempted_while_it_is_planned_are_not_announced() -> None:
    """In step 11 all four rows get a page, and then the last one is preempted for a prefill of higher priority."""
    steps = Steps(make_limits(num_ranks=1, num_pages=34, max_seq_len=100, max_prefill_tokens=12, max_batch_size=6))
    for i in range(1, 5):
        steps.add(i, 3, max_tokens=30)
    for _ in range(4):
        steps.step()
    steps.add(9, 80, max_tokens=4, priority=1)
    for _ in range(6):
        steps.step()
    assert steps.scheduler.preemptions_total == 0
    share = only(steps.step())  # PlanChecker, too, wants a row in the plan for every page that is announced
    assert share.num_decode == 3 and steps.scheduler.preemptions_total == 1
    assert {slot for slot, _, _ in share.new_pages} <= set(share.slots)
    steps.run()


def test_head_of_the_queue_is_not_passed_by_smaller_ones() -> None:
    steps = Steps(make_limits(num_ranks=1, num_pages=16, max_batch_size=4))
    steps.add(1, 30, max_tokens=20)
    steps.step()
    big, small = steps.add(2, 60, max_tokens=1), steps.add(3, 1, max_tokens=1)
    for _ in range(8):
        steps.step()
    assert steps.scheduler.num_new == 2 and not small.is_done
    steps.run()
    assert big.is_done and small.is_done


def test_newcomers_leave_a_page_in_reserve_for_each_running_sequence() -> None:
    """Otherwise their prefill would be thrown away at the next page boundary of somebody before them."""
    steps = Steps(make_limits(num_ranks=1, num_pages=16, max_batch_size=4, max_prefill_tokens=64))
    for i in (1, 2, 3):
        steps.add(i, 15, max_tokens=3)  # 4 pages each; of the 4 that are left, 3 are the reserve
    steps.step()
    steps.add(4, 5, max_tokens=3)
    steps.step()
    assert steps.scheduler.num_new == 1
    steps.run()
    assert steps.scheduler.preemptions_total == 0


def test_pages_that_a_prefill_was_promised_are_not_given_to_newcomers() -> None:
    steps = Steps(make_limits(num_ranks=1, num_pages=16, max_prefill_tokens=8))
    steps.add(1, 36, max_tokens=1)  # 9 pages, in chunks of 8, 8, 8, 8 and 4 tokens
    steps.add(2, 25, max_tokens=1)  # 7 pages: one too many beside them and the page in reserve
    lengths = [list(only(steps.step()).lengths) for _ in range(6)]
    assert lengths == [[8], [8], [8], [8], [4], [8]]


def test_a_more_important_prompt_starts_before_a_long_one_is_through() -> None:
    steps = Steps(make_limits(num_ranks=1, num_pages=64, max_seq_len=200))
    steps.add(1, 150)
    steps.step()
    steps.add(2, 10, priority=1)
    share = only(steps.step())
    assert list(share.lengths) == [10, 6] and [init.sampling.max_tokens for init in share.admitted] == [4]


def test_prompts_spread_over_the_ranks() -> None:
    steps = Steps(make_limits(num_ranks=4, max_batch_size=4))
    for i in range(8):
        steps.add(i, 6 + i, max_tokens=8)
    for _ in range(4):
        steps.step()
    assert [rank.num_sequences for rank in steps.scheduler.ranks] == [2, 2, 2, 2]


def test_every_rank_gets_a_plan_in_every_step() -> None:
    steps = Steps(make_limits(num_ranks=4))
    steps.add(1, 3)
    plan = steps.step()
    assert plan is not None and len(plan.ranks) == 4
    assert sorted(len(share.slots) for share in plan.ranks) == [0, 0, 0, 1]


def test_deadlines_end_the_waiting_and_the_running() -> None:
    steps = Steps(make_limits(num_ranks=1, max_batch_size=1))
    running = steps.add(1, 4, max_tokens=30, deadline_s=5.0)
    waiting = steps.add(2, 4, max_tokens=30, deadline_s=3.0)
    for _ in range(4):
        steps.step()
    steps.scheduler.expire(2.9)
    assert not running.is_done and not waiting.is_done
    steps.scheduler.expire(3.0)
    assert waiting.error is not None and waiting.error.kind is ErrorKind.DEADLINE and not running.is_done
    steps.scheduler.expire(6.0)
    assert running.error is not None and "after 5.000 s" in str(running.error)
    steps.run()
    assert steps.scheduler.errors_total["deadline"] == 2


def test_a_deadline_does_not_outlive_its_request() -> None:
    steps = Steps(make_limits(num_ranks=1))
    steps.add(1, 4, deadline_s=1.0)
    steps.scheduler.abort(1, "cancelled")
    again = steps.add(1, 4, deadline_s=9.0)
    steps.scheduler.expire(2.0)
    steps.run()
    assert again.finish_reason == "length"


def test_queue_and_deadlines_do_not_keep_the_ended() -> None:
    steps = Steps(make_limits(num_ranks=1, max_batch_size=1))
    steps.add(0, 4, max_tokens=30)
    for i in range(1, 2000):
        steps.add(i, 4, deadline_s=1e9)
        steps.scheduler.abort(i, "cancelled")
    assert len(steps.scheduler.planner._queue) < 200 and len(steps.scheduler._deadlines) < 200


def test_pages_and_ends_that_wait_for_their_step_do_not_keep_the_ended() -> None:
    """Sequences with a far max_tokens that end early must not stay behind until that step comes."""
    steps = Steps(make_limits(num_ranks=1, num_pages=20_000, max_seq_len=70_000, eos_token_ids=tuple(range(500))))
    for i in range(200):
        steps.add(i, 4, max_tokens=60_000)
        steps.step()
    steps.run()
    planner = steps.scheduler.planner
    assert sum(map(len, [*planner._grow_at.values(), *planner._final_at.values()])) < 20


@pytest.mark.parametrize(
    "bad", [RankOutput(token_ids=[1], error_word=3), RankOutput(token_ids=[]), RankOutput(token_ids=[1, 2])]
)
def test_a_failed_rank_is_noticed_before_any_sink_hears(bad: RankOutput) -> None:
    limits = make_limits(num_ranks=2)
    steps = Steps(limits)
    sinks = [steps.add(1, 3), steps.add(2, 3)]
    plan = steps.scheduler.schedule()
    assert plan is not None
    with pytest.raises(RankError, match="rank 1"):
        steps.scheduler.commit(plan.step_id, [RankOutput(token_ids=[5]), bad])
    assert all(sink.token_ids == [] for sink in sinks)


def test_a_pool_that_cannot_hold_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="raise num_pages or lower max_seq_len"):
        Scheduler(make_limits(num_pages=4, page_size=4, max_seq_len=17))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_that_failed_ends_its_request_alone_and_gives_no_token(row: int) -> None:
    """Rows 0 and 1 decode, row 2 is a prompt's last chunk; the rows of the next step are planned already."""
    steps, free = Steps(make_limits(num_ranks=1)), Steps(make_limits(num_ranks=1))
    sinks, expected = [], []
    for into, run in ((sinks, steps), (expected, free)):
        into += [run.add(1, 3, max_tokens=9), run.add(2, 3, max_tokens=9)]
        run.step()
        run.step()
        into.append(run.add(3, 5, max_tokens=9))
        run.step()
    plan, (output,) = steps.under_way.pop()
    error = RequestError("its grammar cannot go on")
    steps.under_way.append((plan, [replace(output, failed={row: error})]))
    given = list(sinks[row].token_ids)
    steps.run()
    free.run()
    assert (sinks[row].error, sinks[row].token_ids) == (error, given)
    others = [index for index in range(3) if index != row]
    assert [sinks[index].token_ids for index in others] == [expected[index].token_ids for index in others]
    assert steps.scheduler.errors_total["invalid"] == 1


def test_a_request_starts_once_when_its_first_chunk_is_planned_also_where_it_is_preempted_later() -> None:
    limits = make_limits(num_ranks=1, num_pages=15, max_seq_len=60, max_batch_size=2)
    steps = Steps(limits)
    started: list[int] = []
    for request_id in (1, 2, 3):
        request = replace(make_request(request_id, [5] * 8, 40), on_start=partial(started.append, request_id))
        steps.scheduler.add(request, CollectingSink())
    steps.step()
    assert started == [1, 2]  # two slots
    steps.run()
    assert steps.scheduler.preemptions_total > 0 and started == [1, 2, 3]


def test_expert_rows_are_each_ranks_last_word_and_an_error_word_is_counted() -> None:
    steps = Steps(make_limits(num_ranks=2), overlap=False)
    scheduler = steps.scheduler
    scheduler.add(make_request(1, [1, 2, 3], 4), CollectingSink())
    for rows, word in (((1, 2), 0), ((), 0), ((4, 7), 0), ((9, 9), 4)):
        plan = scheduler.schedule()
        assert plan is not None
        ranks = [RankOutput(token_ids=[5] * sum(share.samples)) for share in plan.ranks]
        outputs = [replace(ranks[0], expert_rows=rows), replace(ranks[1], error_word=word)]
        if word:
            with pytest.raises(RankError, match="error word 0x4"):
                scheduler.commit(plan.step_id, outputs)
        else:
            scheduler.commit(plan.step_id, outputs)
    assert scheduler.expert_rows == [(4, 7), ()] and scheduler.error_words_total == 1
