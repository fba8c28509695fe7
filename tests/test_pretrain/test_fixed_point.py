"""The number format: divisors, tables and the int8 normals, each against the real numbers that it stands for."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from eggroll.pretrain.model import fixed_point as fp


def test_divisors_of_powers_of_four_are_powers_of_two():
    assert [fp.divisor(4**k) for k in range(7)] == [16 * 2**k for k in range(7)]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 24, 100, 128, 255, 512, 1000, 65535])
def test_other_divisors_are_the_nearest_integer(n):
    assert abs(fp.divisor(n) - 16 * math.sqrt(n)) < 0.5


def test_i8_never_is_the_number_whose_sign_cannot_be_flipped():
    assert fp.i8(np.array([-(10**6), -128, -127, 5, 127, 128])).tolist() == [-127, -127, -127, 5, 127, 127]


def test_exp2_is_16_times_a_power_of_two():
    assert np.abs(fp.exp2_table() - 16 * 2 ** (np.arange(256) / 16)).max() <= 0.5
    assert 256 * int(fp.exp2_table()[-1]) < 2**28


def test_log2_is_the_nearest_sixteenth():
    totals = np.unique(np.geomspace(16, 2**30 - 1, 20000).astype(np.int32))
    assert np.abs(fp.log2_sixteenths(totals) - 16 * np.log2(totals / 16)).max() <= 0.5 + 1e-9
    powers = np.array([16 << k for k in range(26)], np.int32)
    assert fp.log2_sixteenths(powers).tolist() == [16 * k for k in range(26)]


def test_normals_have_the_distribution_of_rounded_normals():
    table = fp.normal_table()
    assert (table.dtype, table.size, int(table.max()), int(table.min())) == (np.int8, 65536, 69, -69)
    counts = np.bincount(table.astype(np.int64) + 127, minlength=255)
    assert np.array_equal(counts, counts[::-1])
    exact = [NormalDist().cdf((v + 0.5) / 16) - NormalDist().cdf((v - 0.5) / 16) for v in range(-127, 128)]
    assert np.abs(counts / 65536 - exact).max() <= 2**-16
    assert abs(table.astype(float).var() - (256 + 1 / 12)) < 0.02  # rounding adds 1/12


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.05, 0.001])
def test_thresholds_are_those_of_a_two_sided_test(alpha):
    threshold = fp.threshold_sixteenths(alpha) / 16
    assert alpha <= 2 * (1 - NormalDist().cdf(threshold)) + 1e-12
    assert alpha >= 2 * (1 - NormalDist().cdf(threshold + 1 / 16)) - 1e-12
