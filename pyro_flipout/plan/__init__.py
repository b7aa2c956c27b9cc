# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What is decided of a model before it runs: who its examples are, and what can be flipped."""
