"""What someone said about which completion: records, readers, conversions."""
