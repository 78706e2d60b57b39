"""What EVOR is compared with, on the same data, base policy, evaluation and accounting."""
