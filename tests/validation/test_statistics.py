import numpy as np
import pytest

from enginewright.validation.latency import FEWEST_ROUNDS
from enginewright.validation.statistics import bootstrap_median, bootstrap_ratio, difference, frechet_distance


def rotation(angle: float) -> np.ndarray:
    """A turn of the first two of three axes."""
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


class TestFrechetDistance:
    def test_symmetric(self, cloud):
        other = np.random.default_rng(5).normal(size=(90, 3)) @ rotation(0.4)
        assert frechet_distance(cloud, other) == pytest.approx(frechet_distance(other, cloud))

    def test_turning_both_clouds_changes_nothing(self, cloud):
        other, turn = cloud[:100] * 2 + 1, rotation(1.1)
        assert frechet_distance(cloud @ turn, other @ turn) == pytest.approx(frechet_distance(cloud, other))

    def test_scaling_a_centred_cloud_by_hand(self):
        """Variances 4 and 9 times one: (2s - s)^2 + (3t - t)^2 with s, t the standard deviations."""
        cloud = np.random.default_rng(0).normal(size=(500, 2))
        cloud -= cloud.mean(0)
        white = np.linalg.solve(np.linalg.cholesky(np.cov(cloud, rowvar=False)), cloud.T).T  # covariance 1
        assert frechet_distance(white * [2, 3], white) == pytest.approx(1 + 4)

    def test_more_features_than_samples(self):
        few = np.random.default_rng(0).normal(size=(5, 20))
        assert frechet_distance(few + 1, few) == pytest.approx(20, rel=1e-5)

    def test_torchmetrics_has_the_same_number_and_loses_digits_where_a_covariance_is_singular(self):
        import torch
        from torchmetrics.image.fid import FrechetInceptionDistance

        def theirs(a, b):
            judge = torch.nn.Identity()
            judge.num_features = a.shape[1]
            fid = FrechetInceptionDistance(feature=judge, normalize=True, input_img_size=(a.shape[1],))
            fid.set_dtype(torch.float64)
            fid.update(torch.from_numpy(a), real=False)
            fid.update(torch.from_numpy(b), real=True)
            return fid.compute().item()

        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(500, 64)), rng.normal(0.1, 1.2, size=(800, 64))
        assert frechet_distance(a, b) == pytest.approx(theirs(a, b), rel=1e-6)
        few = a[:20]
        assert abs(frechet_distance(few, few)) < 1e-9 < abs(theirs(few, few))

    def test_one_feature(self):
        assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[5.0], [7.0]])) == pytest.approx(25)

    def test_never_below_0_and_nan_stays_nan(self, cloud):
        assert frechet_distance(cloud, cloud) >= 0
        assert np.isnan(frechet_distance(cloud * np.nan, cloud))
        assert np.isnan(frechet_distance(cloud, np.full((9, 3), np.inf)))

    def test_variances_eighteen_orders_apart_lose_nothing(self):
        """By hand, turned; the eigenvalues of the product of both covariances come out complex here, and 1e-9 off."""
        rng = np.random.default_rng(0)
        white = rng.normal(size=(400, 40))
        white -= white.mean(0)
        white = np.linalg.solve(np.linalg.cholesky(np.cov(white, rowvar=False)), white.T).T  # covariance 1
        turn, _ = np.linalg.qr(rng.normal(size=(40, 40)))
        a, b = np.geomspace(1e-6, 1e3, 40), np.geomspace(1e3, 1e-6, 40)
        by_hand = np.square(a - b).sum()
        assert frechet_distance(white * a @ turn, white * b @ turn) == pytest.approx(by_hand, rel=1e-12)


class TestBootstrapRatio:
    def test_as_few_rounds_as_are_called_safe_still_cover_and_half_as_many_do_not(self):
        hits = {}
        for rounds in (FEWEST_ROUNDS, FEWEST_ROUNDS // 2):
            hits[rounds] = 0
            for seed in range(200):
                rng = np.random.default_rng(seed)
                drift = 1 + 0.3 * rng.random((rounds, 1))
                both = (s * drift * rng.lognormal(0, 0.05, (rounds, 3)) for s in (1.0, 0.7))
                low, high = bootstrap_ratio(*both, seed=0, resamples=500)
                hits[rounds] += low <= 0.7 <= high
        assert hits[FEWEST_ROUNDS] >= 186
        assert hits[FEWEST_ROUNDS // 2] < hits[FEWEST_ROUNDS]

    def test_the_median_of_one_runner_has_its_interval_too(self):
        samples = np.random.default_rng(0).normal(5, 0.1, (10, 3))
        low, high = bootstrap_median(samples, seed=0)
        assert low < np.median(samples) < high
        assert high - low < 0.2

    def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says(self):
        hits = 0
        for seed in range(100):
            rng = np.random.default_rng(seed)
            drift = 1 + 0.3 * rng.random((20, 1))  # what the machine does to a round it does to both
            original, candidate = (scale * drift * rng.lognormal(0, 0.05, (20, 3)) for scale in (1.0, 0.7))
            low, high = bootstrap_ratio(original, candidate, seed=0, resamples=2000)
            hits += low <= 0.7 <= high
        assert 88 <= hits <= 100

    def test_paired_rounds_are_drawn_together(self):
        """Rounds that differ tenfold cancel exactly, since both sides draw the same ones."""
        original = np.repeat(10.0 ** np.arange(-2, 3), 3).reshape(5, 3)
        low, high = bootstrap_ratio(original, 0.8 * original, seed=3)
        assert low == pytest.approx(0.8)
        assert high == pytest.approx(0.8)

    def test_the_seed_decides(self):
        original, candidate = np.random.default_rng(0).uniform(1, 2, (2, 8, 3))
        assert bootstrap_ratio(original, candidate, seed=1) == bootstrap_ratio(original, candidate, seed=1)
        assert bootstrap_ratio(original, candidate, seed=1) != bootstrap_ratio(original, candidate, seed=2)

    def test_a_round_cut_short_counts_with_what_it_has(self):
        original = np.array([[1.0, 1.0], [1.0, np.nan]])
        assert bootstrap_ratio(original, 2 * original, seed=0) == (2.0, 2.0)

    def test_more_noise_widens_it(self):
        rng = np.random.default_rng(0)
        widths = []
        for noise in (0.01, 0.2):
            low, high = bootstrap_ratio(*rng.lognormal(0, noise, (2, 10, 3)), seed=0)
            widths.append(high - low)
        assert widths[0] * 5 < widths[1]


def test_difference_is_candidate_minus_original():
    np.testing.assert_array_equal(difference(np.array([[1, 2]], "B"), np.array([[0, 4]], "B")), [-1.0, 2.0])
