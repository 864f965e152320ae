"""Support for test_monitoring.py: promtool's cases, daemons that Prometheus scrapes, Grafana's schema, Debian's packages."""
