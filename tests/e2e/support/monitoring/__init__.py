"""What the tests of monitoring are made of: cases for promtool, daemons that Prometheus watches, Grafana's schema, Debian's packages."""
