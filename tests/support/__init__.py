"""What tests share: servers, hostile peers, cases, programs that are killed."""
