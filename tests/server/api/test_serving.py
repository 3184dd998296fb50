"""A request's id: the client's where it is sane, else one of its own."""

import re

from trtserve.server.api.serving import request_id_of


def test_ids_are_random_and_never_the_same():
    ids = [request_id_of({"headers": []}) for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


def test_a_sane_id_of_the_client_is_kept():
    assert request_id_of({"headers": [(b"x-request-id", b"my.own-1")]}) == "my.own-1"
    assert request_id_of({"headers": [(b"x-request-id", b"no spaces")]}) != "no spaces"
