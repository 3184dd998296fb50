from array import array

import pytest

from trtserve.plugins.transfer.plan import check_plan, check_region
from trtserve.plugins.transfer_api import BlockCopies, ReadPlan, Region, TransferError

OWN = {"keys": Region("keys", 4096, 10, 100, 128), "values": Region("values", 9999, 10, 50, 50)}
PEER = {"keys": Region("keys", 4096, 20, 100, 100), "values": Region("values", 9999, 5, 60, 60)}


def plan(region="keys", sources=(), targets=()):
    return ReadPlan([BlockCopies(region, array("i", sources), array("i", targets))])


def test_the_bytes_of_a_plan():
    assert check_plan(ReadPlan([]), OWN, PEER) == 0
    assert check_plan(plan(), OWN, PEER) == 0
    assert check_plan(plan(sources=[19, 0, 0], targets=[0, 9, 1]), OWN, PEER) == 300


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (plan("other"), "not known here"),
        (plan("values", [0], [0]), "other block sizes"),
        (plan(sources=[0, 1], targets=[0]), "2 sources for 1 targets"),
        (plan(sources=[20], targets=[0]), "source of region 'keys': ids 20 to 20"),
        (plan(sources=[-1, 3], targets=[0, 1]), "ids -1 to 3"),
        (plan(sources=[0], targets=[10]), "target of region 'keys'"),
        (plan(sources=[0, 1], targets=[4, 4]), "a target appears twice"),
        (ReadPlan(list(plan().copies) * 2), "appears twice in the plan"),
        (ReadPlan([BlockCopies("keys", array("q", [0]), array("q", [0]))]), "array"),
    ],
)
def test_bad_plans_say_why(bad, says):
    with pytest.raises(ValueError, match=says):
        check_plan(bad, OWN, PEER)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (Region("keys", 4096, 1, 1, 1), "registered once"),
        (Region("", 4096, 1, 1, 1), "1 to 256 characters"),
        (Region("new", 4096, 1, 0, 1), "stride"),
        (Region("new", 4096, 1, 9, 8), "stride"),
        (Region("new", 4096, 0, 1, 1), "no memory"),
        (Region("new", 0, 1, 1, 1), "no memory"),
        (Region("new", 2**61, 2**30, 2**40, 2**40), "no memory"),
    ],
)
def test_bad_regions_say_why(bad, says):
    with pytest.raises(TransferError, match=says):
        check_region(bad, OWN)


def test_good_regions_pass():
    check_region(Region("new", 4096, 2**31 - 1, 1, 1), OWN)
