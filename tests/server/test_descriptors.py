"""The first three descriptors, and how many there may be; in processes of their own, whose limits they are."""

import subprocess
import sys

import pytest


def test_closed_descriptors_are_filled_and_open_ones_left_alone():
    program = (
        "from trtserve.server.descriptors import open_standard_descriptors; import os; "
        "open_standard_descriptors(); os.write(2, ' '.join(os.readlink(f'/proc/self/fd/{n}') for n in (0, 1)).encode())"
    )
    command = ["sh", "-c", f'exec {sys.executable} -c "{program}" <&- >&-']
    said = subprocess.run(command, stderr=subprocess.PIPE, check=True).stderr
    assert said == b"/dev/null /dev/null"


@pytest.mark.parametrize(("soft", "enough", "then"), [(64, 65_536, 100), (64, 90, 90), (95, 90, 95)])
def test_the_limit_is_raised_as_far_as_it_may_be(soft, enough, then):
    program = (
        f"import resource; name = resource.RLIMIT_NOFILE; resource.setrlimit(name, ({soft}, 100)); "
        f"from trtserve.server import descriptors; descriptors._ENOUGH = {enough}; "
        "print(descriptors.allow_many_descriptors(), *resource.getrlimit(name))"
    )
    said = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True).stdout
    assert said.split() == [str(number).encode() for number in (then, then, 100)]
