import numpy as np
import pytest
from sklearn import metrics

from tl_jax.report import scores


def test_calibration_error_closed_form():
    # Two bins of two: at 0.9 both right (gap 0.1), at 0.6 one of two right (gap 0.1); one example at 0.3, wrong.
    confidence = np.array([0.9, 0.9, 0.6, 0.6, 0.3])
    found = scores.calibration(confidence, np.array([1, 1, 1, 0, 0]))
    assert found.error == pytest.approx((2 * 0.1 + 2 * 0.1 + 0.3) / 5)
    assert found.count.sum() == 5 and len(found.count) == 15


def test_calibration_bins_are_open_below_and_closed_above():
    found = scores.calibration(np.array([0.0, 0.5, 1.0]), np.array([0, 1, 1]), bins=2)
    assert found.count.tolist() == [2, 1]


def test_perfectly_calibrated_has_no_error():
    confidence = np.repeat(0.75, 8)
    assert scores.calibration(confidence, np.array([1, 1, 1, 0] * 2)).error == pytest.approx(0)


def test_class_scores_equal_sklearn():
    random = np.random.default_rng(0)
    label, predicted = random.integers(0, 5, 200), random.integers(0, 5, 200)
    matrix = scores.confusion_matrix(label, predicted, 5)
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(label, predicted))
    found = scores.class_scores(matrix)
    wanted = metrics.precision_recall_fscore_support(label, predicted)
    np.testing.assert_allclose(np.stack(found), np.stack(wanted))
    assert scores.macro_f1(matrix) == pytest.approx(metrics.f1_score(label, predicted, average='macro'))


def test_absent_class_is_undefined_and_not_in_the_mean():
    label, predicted = np.array([0, 0, 1]), np.array([0, 1, 1])
    matrix = scores.confusion_matrix(label, predicted, 3)
    assert np.isnan(scores.class_scores(matrix).f1[2])
    assert scores.macro_f1(matrix) == pytest.approx(metrics.f1_score(label, predicted, average='macro'))


def test_most_confused_leaves_out_hits_and_zeros():
    matrix = np.array([[9, 0, 2], [5, 9, 0], [0, 0, 9]])
    assert scores.most_confused(matrix, 10) == [(1, 0, 5), (0, 2, 2)]


@pytest.mark.parametrize(('rate', 'count', 'low', 'high'), [(0.5, 10, 0.2366, 0.7634), (1.0, 10, 0.7225, 1.0)])
def test_wilson_interval(rate, count, low, high):
    assert scores.wilson_interval(rate, count) == pytest.approx((low, high), abs=1e-4)
