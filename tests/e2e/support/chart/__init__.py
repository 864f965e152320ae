"""What the tests of the Helm chart are made of: Helm itself, the values, and rules for what it renders."""
