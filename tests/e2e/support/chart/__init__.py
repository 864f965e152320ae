"""Support for the tests of the Helm chart: Helm itself, the values, and rules for the rendered resources."""
