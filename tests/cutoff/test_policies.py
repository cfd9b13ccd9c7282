"""Cutoff policies: when they close a slice, and how they travel."""

import json

import pytest

from tf_syncdist import cutoff
from tf_syncdist.cutoff import (
    BackupWorkers,
    CutoffPolicy,
    Deadline,
    Elfving,
    FullSync,
    OrderStatistics,
    SliceView,
    policies,
)

POLICIES = [FullSync(), BackupWorkers(0), BackupWorkers(1), BackupWorkers(3)]
OTHERS = [Deadline(0.5), Deadline(2, min_fraction=1), Elfving(7), OrderStatistics(3, 0.5)]


def view(contributions: int, possible: int, num_workers: int) -> SliceView:
    """A slice that has waited for a second."""
    return SliceView(2.0, 1.0, contributions, possible, num_workers)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_workers", range(4, 7))
def test_a_slice_closes_with_n_contributions_or_with_all_that_are_possible(
    policy: CutoffPolicy, num_workers: int
) -> None:
    n = policy.replicas_to_aggregate(num_workers)
    for possible in range(1, num_workers + 1):
        for contributions in range(1, possible + 1):
            decision = policy.decide(view(contributions, possible, num_workers))
            assert decision.close == (contributions >= min(n, possible))
            assert decision.wait_until is None
            assert str(min(n, possible)) in decision.reason


def test_nothing_closes_without_a_contribution() -> None:
    assert not FullSync().decide(view(0, 0, 3)).close


def test_replicas_to_aggregate() -> None:
    assert FullSync().replicas_to_aggregate(5) == 5
    assert BackupWorkers(0).replicas_to_aggregate(5) == 5
    assert BackupWorkers(4).replicas_to_aggregate(5) == 1


@pytest.mark.parametrize("b, num_workers", [(1, 1), (5, 5), (6, 5)])
def test_as_many_backup_workers_as_workers_are_refused(b: int, num_workers: int) -> None:
    with pytest.raises(ValueError) as error:
        BackupWorkers(b).replicas_to_aggregate(num_workers)
    for part in (f"backup_workers={b}", f"{num_workers} worker", f"at most {num_workers - 1}"):
        assert part in str(error.value)


@pytest.mark.parametrize("b", [-1, 1.0, "1", None, True, [1]])
def test_a_number_of_backup_workers_that_is_none_is_refused(b: object) -> None:
    with pytest.raises(ValueError, match="`backup_workers` must be an integer") as error:
        BackupWorkers(b)
    assert f"backup_workers={b!r}" in str(error.value)
    assert type(b).__name__ in str(error.value)


@pytest.mark.parametrize("policy", POLICIES + OTHERS)
def test_a_policy_arrives_as_it_left(policy: CutoffPolicy) -> None:
    text = cutoff.serialize(policy)
    assert cutoff.deserialize(text) == policy
    assert type(policy).from_config(policy.get_config()) == policy
    # All workers must say the same, letter by letter.
    assert text == cutoff.serialize(cutoff.deserialize(text))


def test_the_form_in_which_a_policy_travels() -> None:
    data = json.loads(cutoff.serialize(BackupWorkers(2)))
    assert data == {"class_name": "BackupWorkers", "config": {"b": 2}}


def test_equal_policies_are_equal_and_cannot_be_changed() -> None:
    assert BackupWorkers(1) == BackupWorkers(1) != BackupWorkers(2)
    with pytest.raises(AttributeError):
        BackupWorkers(1).b = 2


class Homemade:
    """A policy that the service does not know."""

    def get_config(self) -> dict:
        return {}


def test_only_policies_that_the_service_knows_are_serialized() -> None:
    for stranger in (Homemade(), type("FullSync", (Homemade,), {})(), FullSync, None):
        with pytest.raises(ValueError, match="BackupWorkers, .*FullSync") as error:
            cutoff.serialize(stranger)
        assert "cutoff=" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "null",
        "3",
        "[]",
        "{}",
        '{"class_name": "FullSync"}',
        '{"config": {}}',
        '{"class_name": "SliceView", "config": {}}',
        '{"class_name": "os.system", "config": {"command": "true"}}',
        '{"class_name": "__import__", "config": {"name": "antigravity"}}',
        '{"class_name": ["FullSync"], "config": {}}',
        '{"class_name": "FullSync", "config": {"b": 1}}',
        '{"class_name": "FullSync", "config": null}',
        '{"class_name": "BackupWorkers", "config": {}}',
        '{"class_name": "BackupWorkers", "config": [1]}',
        '{"class_name": "BackupWorkers", "config": {"b": -1}}',
        '{"class_name": "BackupWorkers", "config": {"b": 1.5}}',
        '{"class_name": "BackupWorkers", "config": {"b": true}}',
        '{"class_name": "BackupWorkers", "config": {"b": 1, "c": 2}}',
        '{"class_name": "Deadline", "config": {"seconds": -1}}',
        '{"class_name": "Elfving", "config": {"window": 0}}',
        '{"class_name": "OrderStatistics", "config": {"min_fraction": 2}}',
        "[" * 100_000,
    ],
    ids=range(24),
)
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="Expected a cutoff policy such as") as error:
        cutoff.deserialize(text)
    assert repr(text[:200]) in str(error.value)
    assert len(str(error.value)) < 1000


def test_every_policy_with_a_public_name_can_travel() -> None:
    public = {n for n in cutoff.__all__ if hasattr(getattr(cutoff, n), "replicas_to_aggregate")}
    assert public - {"CutoffPolicy"} == set(policies._POLICIES)
