"""Norms over several channels: what is left is normalised by itself, as computed by hand."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from zoo import built

from mbridge_prune.dynamic import shrink, sort
from mbridge_prune.heterogeneous import Forward
from mbridge_prune.vision.table import table_of


def cut(name, key, order, size):
    model, x = built(name)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    table = table_of(model, Forward.of(x)).table
    sort(table, {key: torch.tensor([order])})
    shrink(table, {key: size})
    return model, x, weights


def test_a_layer_norm_normalises_the_features_that_are_left():
    order = [3, 9, 1, 15, 7, 0, 2, 4, 5, 6, 8, 10, 11, 12, 13, 14]
    model, x, w = cut("layer_norm", "0.out_features", order, 5)
    kept = order[:5]
    hidden = F.linear(x, w["0.weight"][kept], w["0.bias"][kept])
    hidden = F.layer_norm(hidden, (5,), w["1.weight"][kept], w["1.bias"][kept])
    expected = F.linear(hidden, w["2.weight"][:, kept], w["2.bias"])
    torch.testing.assert_close(model(x), expected)
    assert model[1].normalized_shape == (5,)


def test_a_group_norm_keeps_its_groups_and_the_same_places_in_each():
    # Twelve channels in three groups of four: a unit is a place of every group.
    model, x, w = cut("group_norm", "0.out_channels", [2, 0, 3, 1], 2)
    kept = [2, 0, 6, 4, 10, 8]
    hidden = F.conv2d(x, w["0.weight"][kept], w["0.bias"][kept], padding=1)
    hidden = F.group_norm(hidden, 3, w["1.weight"][kept], w["1.bias"][kept]).relu()
    hidden = F.conv2d(hidden, w["3.weight"][:, kept], w["3.bias"], padding=1)
    torch.testing.assert_close(model(x), hidden.mean((2, 3)))
    assert (model[1].num_groups, model[1].num_channels) == (3, 6)


def test_a_layer_norm_over_an_image_keeps_its_positions():
    model, x, w = cut("layer_norm_image", "0.out_channels", [5, 1, 0, 2, 3, 4, 6, 7], 3)
    kept = [5, 1, 0]
    hidden = F.conv2d(x, w["0.weight"][kept], w["0.bias"][kept], padding=1)
    hidden = F.layer_norm(hidden, (3, 8, 8), w["1.weight"][kept], w["1.bias"][kept])
    hidden = F.conv2d(hidden, w["2.weight"][:, kept], w["2.bias"], padding=1)
    torch.testing.assert_close(model(x), hidden.mean((2, 3)))
    assert model[1].normalized_shape == (3, 8, 8)
