"""Digests that caches on disk are known by: their values may not change."""

import hashlib

import pytest
import torch
from torch import nn

from hfshrink.digests import digest_of, weights_digest
from hfshrink.errors import SettingError


def test_content_is_known_by_its_sorted_json():
    expected = hashlib.blake2b(b'{"a": [1, 2], "b": "x"}', digest_size=16).hexdigest()
    assert digest_of({"b": "x", "a": (1, 2)}) == expected


def test_weights_are_known_by_name_type_shape_and_bytes():
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 2.0)
    one, two = b"\x00\x00\x80\x3f", b"\x00\x00\x00\x40"
    content = b"bias:torch.float32(1,);" + two + b"weight:torch.float32(1, 2);" + one + one
    assert weights_digest(model) == hashlib.blake2b(content, digest_size=16).hexdigest()
    assert weights_digest(model, "BertModel") == hashlib.blake2b(b"BertModel" + content, digest_size=16).hexdigest()


def test_offloaded_weights_are_refused():
    with torch.device("meta"):
        model = nn.Linear(2, 1)
    with pytest.raises(SettingError, match="The weight bias is offloaded. Load the model into memory"):
        weights_digest(model)
