"""Floating-point operations of gradient steps, counted: two for each multiplication of their matrix products.

Backward passes cost twice the forward one, but for the gradient with respect to the inputs of the first layer, which
nobody asks for. Activations, LayerNorm and Adam are not counted. XLA's own count takes a loop for one of its rounds.
"""

from typing import Any

import equinox as eqx
import jax

from common.networks import MLP, Critic, DirectCritic, FlowCritic, VelocityPolicy


def num_parameters(critic: Critic) -> int:
    """Parameters of a critic; C51's atoms are none."""
    atoms = critic.atoms.size if isinstance(critic, DirectCritic) else 0
    return sum(leaf.size for leaf in jax.tree.leaves(critic)) - atoms


def mlp_macs(mlp: MLP) -> int:
    """Multiplications of one forward pass."""
    return sum(layer.weight.size for layer in (*mlp.hidden, mlp.output))


def matrices(network: Any) -> int:
    """Elements of all matrices of a network: multiplications of a pass that uses each of them once."""
    return sum(leaf.size for leaf in jax.tree.leaves(network) if leaf.ndim > 1)


def policy_macs(policy: eqx.Module) -> tuple[int, int]:
    """Multiplications of one velocity, and those of its first layer. Of a class of one's own all matrices count."""
    if not isinstance(getattr(policy, "mlp", None), MLP):
        return matrices(policy), 0
    return mlp_macs(policy.mlp), policy.mlp.hidden[0].weight.size


def critic_macs(critic: Critic) -> tuple[int, int, int]:
    """Multiplications of `features`, of one `velocity`, and of the first layer; a critic that says the law at once has
    features only. Of a class of one's own all matrices count for the velocity."""
    if isinstance(critic, DirectCritic):
        return sum(map(mlp_macs, critic.mlps)), 0, sum(mlp.hidden[0].weight.size for mlp in critic.mlps)
    if not isinstance(critic, FlowCritic):
        return 0, matrices(critic), 0
    trunk = [linear.weight.size for linear, _ in critic.trunk]
    split = critic.inputs * critic.head.hidden[0].weight.shape[1]
    first = trunk[0] if trunk else critic.head.hidden[0].weight.size
    return sum(trunk) + split, mlp_macs(critic.head) - split, first


def step_flops(args: Any, critic: Critic, policy: VelocityPolicy | None = None) -> float:
    """FLOPs of one gradient step of stage 2, or of a baseline: forward and backward, the target, the choice of the next
    action. With a policy that is trained beside the critic, also that one's step and its draws."""
    features, velocity, first = critic_macs(critic)
    macs = 3 * (features + velocity) - first + features
    solve = args.ode.evaluations
    macs += velocity * {"paper": 1, "velocity": solve + 1}.get(args.td_target, solve)
    if args.next_action == "softmax":
        macs += args.num_next_actions * (features + args.backup_returns * args.backup_steps * velocity)
    if policy is not None:
        whole, first = policy_macs(policy)
        shared = first * policy.spec.observation // (policy.spec.observation + policy.spec.action + 1)
        macs += 3 * whole - first + shared + args.num_next_actions * solve * (whole - shared)
    return 2.0 * args.batch_size * macs
