"""What a training step costs, and where the ratio between on-policy and off-policy comes from.

A forward pass takes 2 operations per parameter and token, a backward pass 4. Generation reads all
weights for every token of the batch: it is bound by memory bandwidth, not by arithmetic, and that,
with its extra pass over each token, is the ratio.
"""

from dataclasses import asdict, dataclass
from typing import Any

from shared_core.errors import InputError

__all__ = ["CostAccount", "cost_account"]


@dataclass(frozen=True)
class CostAccount:
    """Seconds of one step by part, on an ideal device.

    Attributes:
        student_training: Forward and backward of the student.
        teacher_forward: The teacher's scores.
        generation: The student's rollouts; only on-policy pays them.
        off_policy: Sum without generation.
        on_policy: Sum with it, for a share of student data of 1.
        ratio: on_policy / off_policy.
    """

    student_training: float
    teacher_forward: float
    generation: float
    off_policy: float
    on_policy: float
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self)


def cost_account(
    student_parameters: float,
    teacher_parameters: float,
    *,
    batch: int = 32,
    prompt: int = 256,
    response: int = 512,
    flops: float = 400e12,
    bandwidth: float = 3e12,
    bytes_per_parameter: float = 2.0,
    checkpointing: bool = True,
) -> CostAccount:
    """Estimate a step's cost, off-policy and on-policy.

    Args:
        student_parameters: Number of them.
        teacher_parameters: Number of them.
        batch: Sequences per step and device.
        prompt: Tokens of a prompt.
        response: Tokens of a response, and generation steps.
        flops: Achieved operations per second.
        bandwidth: Achieved bytes per second.
        bytes_per_parameter: 2 for bfloat16.
        checkpointing: The student's forward pass is computed twice.

    Returns:
        Seconds; attention, the cache, communication and the optimizer are not counted.

    Raises:
        InputError: If a number is not positive.

    Examples:
        >>> cost_account(3e9, 7e9).ratio
        1.49
    """
    numbers = (
        student_parameters,
        teacher_parameters,
        batch,
        prompt,
        response,
        flops,
        bandwidth,
        bytes_per_parameter,
    )
    if min(numbers) <= 0:
        raise InputError("every number of a cost account has to be above 0")
    tokens = batch * (prompt + response)
    student = (8 if checkpointing else 6) * student_parameters * tokens / flops
    teacher = 2 * teacher_parameters * tokens / flops
    prefill = 2 * student_parameters * batch * prompt / flops
    arithmetic = 2 * student_parameters * batch / flops
    reading = student_parameters * bytes_per_parameter / bandwidth
    generation = prefill + response * max(arithmetic, reading)
    off = student + teacher
    return CostAccount(student, teacher, generation, off, off + generation, 1 + generation / off)
