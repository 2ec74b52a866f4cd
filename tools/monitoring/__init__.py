"""What an operator hangs basefs into: a Grafana dashboard and alert rules for Prometheus."""
