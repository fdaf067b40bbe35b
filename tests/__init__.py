"""Tests, and what they share."""

GROUP_BYTES = 64 * 1024
"""In place of `distsign.plan.COALESCE_BYTES`: models of tests are small, and a step has to have several groups."""
