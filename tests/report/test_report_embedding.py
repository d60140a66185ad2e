import numpy as np
import pytest
from sklearn import datasets, decomposition, manifold

from tl_jax.report import embedding


@pytest.fixture(scope='module')
def digits():
    features, label = datasets.load_digits(return_X_y=True)
    return features[:300].astype(np.float32), label[:300]


@pytest.mark.parametrize('shape', [(60, 20), (20, 60), (400, 300)])
def test_pca_equals_sklearn_up_to_sign(shape):
    scale = np.append([9.0, 6.0], np.ones(shape[1] - 2))  # two axes that stand out, as those worth a plot do
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * scale
    scores, share = embedding.pca(x)
    exact = decomposition.PCA(2, svd_solver='full')
    wanted = exact.fit_transform(x)
    np.testing.assert_allclose(np.abs(scores), np.abs(wanted), rtol=1e-3, atol=0.02 * wanted.std())
    np.testing.assert_allclose(share, exact.explained_variance_ratio_, rtol=1e-3)


def test_pca_of_too_few_dimensions_pads_with_zeros():
    scores, share = embedding.pca(np.arange(5.0)[:, None])
    assert scores.shape == (5, 2) and not scores[:, 1].any() and share.tolist() == [1, 0]


def test_affinities_are_a_distribution_of_the_wanted_perplexity(digits):
    conditional = embedding.affinities(embedding.squared_distances(digits[0]), 30)
    assert conditional.sum() == pytest.approx(1)
    assert (np.diag(conditional) == 0).all()
    wanted = manifold._t_sne._joint_probabilities(embedding.squared_distances(digits[0]), 30, 0)
    np.testing.assert_allclose(conditional[np.triu_indices(300, 1)][:100], _square(wanted, 300)[:100], atol=1e-6)


def _square(condensed, count):
    from scipy.spatial.distance import squareform

    return squareform(condensed)[np.triu_indices(count, 1)]


def test_tsne_is_as_faithful_as_sklearns(digits):
    features, _ = digits
    ours = embedding.tsne(features, steps=400)
    theirs = manifold.TSNE(init='pca', random_state=0, max_iter=300).fit_transform(features)
    faithful = [manifold.trustworthiness(features, points) for points in (ours, theirs)]
    assert faithful[0] > 0.98 and faithful[0] > faithful[1] - 0.01


def test_tsne_is_deterministic_and_bears_equal_points():
    features = np.repeat(np.eye(4, dtype=np.float32), 4, axis=0)
    first = embedding.tsne(features, steps=50)
    assert np.isfinite(first).all() and np.array_equal(first, embedding.tsne(features, steps=50))
