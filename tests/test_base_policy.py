"""The base-policy check's own arithmetic, on trajectories whose lifts are known."""

import numpy as np

from benchmarks import base_policy


def test_approach_rows_are_those_with_a_lift_soon_but_not_at_once():
    """Two episodes of 100 rows, a lift at row 60 of the first and at row 10 of the second: of the first, the rows 31 to
    48 have it in 12 to 29 steps; of the second none, since row 10 is too near to its start."""
    qpos = np.zeros((200, 21), np.float32)
    qpos[60:70, 16] = qpos[110:115, 16] = 0.1
    terminals = np.arange(200) % 100 == 99
    rows = base_policy.approach_rows(qpos, terminals, 5)
    assert rows.tolist() == list(range(31, 49))


def test_a_policy_that_ignores_the_cubes_explains_as_much_with_shuffled_ones():
    """The data's action is half in the arm's coordinates, half in the cubes': a policy of both explains everything and
    loses with shuffled cubes; one of the arm alone explains half, shuffled or not."""
    rng = np.random.default_rng(0)
    count = 4000
    observations = rng.normal(size=(count, 24)).astype(np.float32)
    arm, cubes = observations[:, :2], observations[:, 19:21]
    qpos = np.zeros((count, 21), np.float32)
    qpos[::40, 16] = 0.1
    arrays = dict(
        observations=observations,
        actions=np.concatenate([arm + cubes, np.zeros((count, 3))], axis=1),
        terminals=np.arange(count) == count - 1,
        qpos=qpos,
    )

    def both(x, noise):
        x = np.asarray(x)
        return (x[:, None, :2] + x[:, None, 19:21]) + 0.0 * np.asarray(noise)[..., :2]

    def arm_only(x, noise):
        return np.asarray(x)[:, None, :2] + 0.0 * np.asarray(noise)[..., :2]

    full, shuffled = base_policy.explained_variance(both, arrays, 1)
    assert full > 0.999 and abs(shuffled) < 0.15
    full, shuffled = base_policy.explained_variance(arm_only, arrays, 1)
    assert full == shuffled and abs(full - 0.5) < 0.1
